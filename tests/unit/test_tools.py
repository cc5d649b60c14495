"""Which tools there are, who may offer them, and what a call gives; the search against a real server, here."""

import json
import pickle
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner

from mmft.chat.tools import MAX_RESULT, Toolbox, choose, tool_names, wrong_arguments
from mmft.cli.talk import chat
from mmft.errors import DataError, MmftError, PluginError
from mmft.plugins import Plugins, load_plugins
from mmft.specs import Tool
from mmft.testing import check_tool
from mmft.types import ToolCall
from mmft_plugins import _search
from mmft_plugins import tools as shipped

DICE = """
from mmft import Tool, hookimpl

def roll(sides):
    return str(sides)

@hookimpl
def mmft_tools():
    schema = {"type": "object", "properties": {"sides": {"type": "integer"}}, "required": ["sides"]}
    return [Tool(name="dice", description="Roll a die.", parameters=schema, run=roll)]
"""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (_search.KEY, _search.URL):
        monkeypatch.delenv(name, raising=False)


def test_a_tool_of_another_distribution_is_used_like_the_shipped_ones(install: Callable[..., Path]) -> None:
    install("acme-mmft", "0.2.0", {"acme": "acme_tools"}, acme_tools=DICE)
    box = choose(["dice", "calculate"], load_plugins())
    assert box.names == ["dice", "calculate"]
    assert box.use(ToolCall("dice", {"sides": 6})).result == "6"
    assert choose(["acme/dice"], load_plugins()).names == ["dice"]


def test_the_shipped_tools_keep_the_rules_of_every_tool(plugins: Plugins) -> None:
    for tool in shipped.mmft_tools():
        check_tool(tool)
        assert pickle.loads(pickle.dumps(tool)).schema == tool.schema
    assert plugins.tools.names() == ["calculate", "search", "solve"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"parameters": {"type": "string"}}, "must be the schema of an object"),
        ({"parameters": {"type": "object", "required": ["x"]}}, "required, but not among its properties: x"),
        ({"parameters": {"type": "object", "properties": {1j: 2}}}, "its parameters are no JSON"),
        ({"description": " "}, "it has no description"),
        ({"unavailable": lambda: False}, r"unavailable\(\) gave False"),
    ],
)
def test_a_tool_that_breaks_a_rule_is_named(changes: dict[str, Any], error: str) -> None:
    whole = {"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}, "run": str}
    check_tool(Tool(**whole))
    with pytest.raises(PluginError, match=f"tool 'f': .*{error}|tool 'f': {error}"):
        check_tool(Tool(**{**whole, **changes}))


def test_all_are_those_that_can_be_used_and_the_others_are_told(plugins: Plugins) -> None:
    box = choose(["all"], plugins)
    assert box.names == ["calculate", "solve"]
    assert list(box.left_out) == ["search"] and box.left_out["search"].startswith(
        "SERPER_API_KEY is not set; get a key"
    )


def test_names_may_have_commas_or_spaces_between_them() -> None:
    assert tool_names(" calculate,solve  search ,") == ["calculate", "solve", "search"]


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "number"}, "how": {"enum": ["up", "down"]}, "flag": {"type": ["boolean", "null"]}},
    "required": ["n"],
}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"n": 1}, ""),
        ({"n": 1.5, "how": "up", "flag": None}, ""),
        ({}, "f needs 'n'; it takes: n (number), how (any value), flag (boolean or null)"),
        ({"n": "1"}, 'f: n must be number, found "1"'),
        ({"n": True}, "f: n must be number, found true"),
        ({"n": 1, "flag": 1}, "f: flag must be boolean or null, found 1"),
        ({"n": 1, "how": "left"}, 'f: how must be one of ["up", "down"]'),
        ({"n": 1, "m": 2}, "f has no argument 'm'; it takes: "),
    ],
)
def test_arguments_that_do_not_fit_the_schema_are_told(arguments: dict[str, Any], problem: str) -> None:
    tool = Tool(name="f", description="F.", parameters=SCHEMA, run=str)
    found = wrong_arguments(tool, arguments)
    assert found.startswith(problem) and bool(found) == bool(problem)


def test_a_long_result_is_cut_and_halves_of_characters_are_mended() -> None:
    parameters = {"type": "object", "properties": {}}
    box = Toolbox((Tool(name="f", description="F.", parameters=parameters, run=lambda: "a" * 5000),))
    assert box.use(ToolCall("f", {})).result == "a" * MAX_RESULT + "\n(cut; 5,000 characters in all)"
    half = Toolbox((Tool(name="f", description="F.", parameters=parameters, run=lambda: "a\ud83d"),))
    assert half.use(ToolCall("f", {})).result == "a?"


def test_an_unknown_tool_is_an_error_before_a_model_is_loaded() -> None:
    for arguments in (["--tools", "calc"], ["--with-plugins", "calculate", "calc", "-m", "Hi"]):
        outcome = CliRunner().invoke(chat, ["no/such/model", *arguments])
        assert isinstance(outcome.exception, MmftError) and "no tool named 'calc'; did you mean" in str(
            outcome.exception
        )


def test_xtuners_spelling_takes_names_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = CliRunner().invoke(chat, ["no/such/model", "--with-plugins", "calculate", "solve", "search"])
    assert "tool 'search' cannot be used: SERPER_API_KEY is not set" in str(outcome.exception)


class Engine(BaseHTTPRequestHandler):
    """A search engine: what it answers and what it was asked are on its server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((json.loads(body), self.headers.get("X-API-KEY"), self.path))  # type: ignore[attr-defined]
        status, headers, content = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST  # what a redirect would become

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Engine)
    server.asked, server.answer = [], (200, {}, b"{}")
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(_search.URL, f"http://127.0.0.1:{server.server_port}/search")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_a_search_posts_the_query_with_the_key_and_gives_the_first_hits(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits = [{"title": f"T{n}", "snippet": f"two\nlines {n}", "link": f"http://{n}"} for n in range(9)]
    engine.answer = (200, {}, json.dumps({"answerBox": {"answer": "42"}, "organic": hits}).encode())
    monkeypatch.setenv(_search.KEY, "secret")
    lines = shipped.search("what?").splitlines()
    assert lines[:2] == ["answer: 42", "1. T0: two lines 0 (http://0)"] and len(lines) == 1 + _search.MAX_HITS
    assert engine.asked == [({"q": "what?"}, "secret", "/search")]


def test_an_endpoint_of_ones_own_needs_no_key(engine: Any) -> None:
    assert shipped.SEARCH.unavailable() is None
    assert shipped.search("x") == "nothing found"
    assert engine.asked[0][1] is None


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((403, {}, b""), "the search engine answers with HTTP 403; is SERPER_API_KEY right?"),
        ((500, {}, b""), "the search engine answers with HTTP 500"),
        ((200, {}, b"<html>"), "something that is no JSON"),
        ((200, {}, b"[" * 100_000), "something that is no JSON"),
        ((200, {}, b"x" * (_search.MAX_BYTES + 1)), "more than 500,000 bytes"),
    ],
)
def test_a_search_engine_that_answers_nonsense_is_one_line(
    answer: tuple[int, dict[str, str], bytes], error: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_search.KEY, "secret")
    engine.answer = answer
    with pytest.raises(DataError) as raised:
        shipped.search("x")
    assert error in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"[]", b'"text"', b'{"organic": 5}', b'{"organic": ["x"], "answerBox": []}', b"null"]
)
def test_json_of_another_form_is_nothing_found(content: bytes, engine: Any) -> None:
    engine.answer = (200, {}, content)
    assert shipped.search("x") == "nothing found"


def test_the_key_does_not_follow_a_redirect(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_search.KEY, "secret")
    engine.answer = (302, {"Location": f"http://127.0.0.1:{engine.server_port}/elsewhere"}, b"")
    with pytest.raises(DataError, match="HTTP 302"):
        shipped.search("x")
    assert [path for _, _, path in engine.asked] == ["/search"]


def test_a_search_engine_that_is_not_there_is_one_line(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.shutdown()
    engine.server_close()
    with pytest.raises(DataError, match="the search engine cannot be reached: "):
        shipped.search("x")


def test_an_address_that_is_no_address_is_refused_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_search.URL, "file:///etc/passwd")
    assert "allowed is an address with https:// or http://" in str(shipped.SEARCH.unavailable())
    with pytest.raises(DataError, match="allowed is an address"):
        shipped.search("x")

"""The rules of the server, without a network: what is read, what is kept, who is let in, what is answered."""

import asyncio
import base64
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_models import SHORT, counted, make_assistant, pictures_encoded
from PIL import Image as PILImage

from mmft.chat.server.app import ServerOptions, bind, build_app
from mmft.chat.server.desk import Desk, Job
from mmft.chat.server.engines import command
from mmft.chat.server.errors import Refused
from mmft.chat.server.pictures import Pictures
from mmft.chat.server.request import Reader
from mmft.cli.serve import served_name
from mmft.errors import MmftError, ModelError
from mmft.inference import Assistant, Generation, user_message
from mmft.memory import Memory, Usage
from mmft.plugins import load_plugins
from mmft.types import Conversation, Image, Message, Text, ToolCall

LOOK_UP = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}},
}
QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return make_assistant(tmp_path_factory.mktemp("seeing"), sees=True)


@dataclass(frozen=True)
class Scripted(Assistant):
    """A model that writes what the test says, and remembers what it was asked."""

    script: Sequence[Sequence[str]] = ()
    asked: list[Conversation] = field(default_factory=list)

    def stream(
        self, conversation: Conversation, generation: Generation | None = None, memory: Memory | None = None,
        *, marks: bool = False, cancel: Any = None,
    ) -> Iterator[str]:  # fmt: skip
        assert memory is not None
        self.asked.append(conversation)
        yield from self.script[len(self.asked) - 1]
        memory.usage = Usage(3, 0, 5, "stop")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


@pytest.fixture
def serving(folder: Path) -> Iterator[Callable[..., tuple[httpx.AsyncClient, Desk]]]:
    """`serving(assistant, api_key=...)`: a client of the application, and the desk behind it."""
    desks: list[Desk] = []

    def serving(assistant: Assistant, **options: Any) -> tuple[httpx.AsyncClient, Desk]:
        server, pictures = ServerOptions(**options), Pictures(folder)
        desk = Desk(assistant, pictures, max_waiting=server.max_waiting, max_context=server.max_context)
        desks.append(desk)
        app = build_app(Reader("m", assistant.template, assistant.sees, SHORT, pictures), desk, server)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server/v1", timeout=120), desk

    yield serving
    for desk in desks:
        desk.close()


def post(client: httpx.AsyncClient, *requests: dict[str, Any], headers: dict[str, str] | None = None) -> list[Any]:
    """The responses to requests that come one after another."""

    async def everything() -> list[Any]:
        return [await client.post("/chat/completions", json=request, headers=headers) for request in requests]

    return asyncio.run(everything())


@pytest.fixture
def read(seeing: Assistant, folder: Path) -> Callable[..., Conversation]:
    """`read(*messages)`: the conversation of a request."""
    reader = Reader("m", seeing.template, True, Generation(), Pictures(folder))
    return lambda *messages, **more: reader.read(json.dumps({"messages": messages, **more}).encode()).conversation


def data_url(color: str, tmp_path: Path) -> str:
    PILImage.new("RGB", (30, 20), color).save(tmp_path / f"{color}.png")
    return "data:image/png;base64," + base64.b64encode((tmp_path / f"{color}.png").read_bytes()).decode()


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_pictures_before_or_after_the_text_are_asked_about_as_in_chat(
    read: Callable[..., Conversation], tmp_path: Path
) -> None:
    red, blue = shown(data_url("red", tmp_path)), shown(data_url("blue", tmp_path))
    for content in ([red, blue, said("Which?")], [said("Which?"), red, blue], [red, said("Wh"), said("ich?"), blue]):
        (message,) = read({"role": "user", "content": content}).messages
        assert message == user_message("Which?", [image.source for image in message.images])
        assert len({image.source for image in message.images}) == 2


def test_a_picture_between_two_texts_stays_there(read: Callable[..., Conversation], tmp_path: Path) -> None:
    content = [said("First: "), shown(data_url("red", tmp_path)), said(" and then?")]
    (message,) = read({"role": "user", "content": content}).messages
    assert [type(part) for part in message.parts] == [Text, Image, Text]


def test_calls_and_their_results_are_read_as_the_training_data_is(
    seeing: Assistant, read: Callable[..., Conversation]
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "cat"}'}}
    conversation = read(
        {"role": "user", "content": "What is a cat?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "An animal."},
        tools=[LOOK_UP],
    )
    assert conversation.messages[1:] == (
        Message("assistant", (), (ToolCall("look_up", {"word": "cat"}, "c1"),)),
        Message("tool", (Text("An animal."),), call_id="c1"),
    )
    assert conversation.tools == (LOOK_UP,)
    prompt = seeing.shape.tokenizer.hf.decode(seeing.prompt(conversation).input_ids)
    assert prompt.index('"word": "cat"') < prompt.index("An animal.")


@pytest.mark.parametrize(
    ("messages", "more", "message"),
    [
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], {}, "'input_audio'; allowed are"),
        ([{"role": "user", "content": 7}], {}, r"messages\[0\]: content is neither"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], {}, "as JSON in a st"),
        (["Hi"], {}, r"messages\[0\]: role is None"),
        ([{"role": "user", "content": "Hi"}], {"tools": [{"name": "f"}]}, r"tools\[0\]: allowed is"),
        ([{"role": "user", "content": "Hi"}], {"tool_choice": "required"}, 'tool_choice .* "auto" or "none"'),
        ([{"role": "user", "content": "Hi"}], {"max_tokens": 1, "max_completion_tokens": 2}, "differ; give one"),
        ([{"role": "user", "content": "Hi"}], {"reasoning_effort": "high"}, "reasoning_effort is not supported"),
    ],
)
def test_what_a_request_may_not_say(
    read: Callable[..., Conversation], messages: list[Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        read(*messages, **more)


def test_half_a_character_is_no_json(read: Callable[..., Conversation]) -> None:
    with pytest.raises(Refused, match="is no JSON"):
        read({"role": "user", "content": "\ud800"})


def test_a_picture_is_kept_while_a_request_needs_it_and_no_longer(folder: Path, tmp_path: Path) -> None:
    pictures, url = Pictures(folder), data_url("red", tmp_path)
    first, again = pictures.hold(url, "here"), pictures.hold(url, "there")
    assert first == again
    pictures.release([first])
    assert first.is_file()
    pictures.release([again])
    assert list(folder.iterdir()) == []


def test_a_request_that_is_refused_leaves_no_picture(
    read: Callable[..., Conversation], folder: Path, tmp_path: Path
) -> None:
    good, bad = shown(data_url("red", tmp_path)), shown("data:image/png;base64,AAAA")
    with pytest.raises(Refused, match="not an image"):
        read({"role": "user", "content": [good, good, bad]})
    assert list(folder.iterdir()) == []


def test_a_picture_that_is_sent_again_is_not_encoded_again(
    seeing: Assistant, serving: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    client, _ = serving(seeing)
    first = {"role": "user", "content": [shown(data_url("red", tmp_path)), said("What is it?")]}
    with pictures_encoded(seeing) as encoded:
        (answer,) = post(client, {"messages": [first]})
        history = [first, answer.json()["choices"][0]["message"], {"role": "user", "content": "And now?"}]
        (again,) = post(client, {"messages": history})
    assert encoded == [1]
    usage = again.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > answer.json()["usage"]["prompt_tokens"]
    assert len(list(folder.iterdir())) == 1


def test_a_call_is_handed_out_and_never_shown(seeing: Assistant, serving: Callable[..., Any]) -> None:
    written = ["I look.", "\n", "<tool", '_call>\n{"name": "look_up", "arguments": ', '{"word": "cat"}}\n</tool_call>']
    scripted = Scripted(seeing.model, seeing.shape, seeing.template, [written, written])
    client, _ = serving(scripted)
    whole, stream = post(client, {**QUESTION, "tools": [LOOK_UP]}, {**QUESTION, "tools": [LOOK_UP], "stream": True})
    choice = whole.json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"].strip()) == ("tool_calls", "I look.")
    assert call["function"] == {"name": "look_up", "arguments": '{"word": "cat"}'}
    assert call["id"] and call["type"] == "function"
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.text.split("\n\n") if "{" in line]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == "I look."
    assert [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta] == [call["function"]]
    assert (chunks[-1]["choices"][0]["finish_reason"], stream.text.endswith("data: [DONE]\n\n")) == ("tool_calls", True)
    assert scripted.asked[0].tools == (LOOK_UP,)


def test_a_format_that_says_it_calls_nothing_is_told_so_and_answers(
    seeing: Assistant, serving: Callable[..., Any]
) -> None:
    nothing = ToolCall("", {}, "c1")
    template = replace(
        seeing.template, call_marks=("<none>",), read_calls=lambda text: ("", (nothing,)) if "<" in text else (text, ())
    )
    scripted = Scripted(seeing.model, seeing.shape, template, [["<none>"], ["It ", "is."]])
    client, _ = serving(scripted)
    (answer,) = post(client, {**QUESTION, "tools": [LOOK_UP]})
    choice = answer.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is.", "stop")
    assert scripted.asked[1].messages[-1] == Message("tool", (Text("None"),), call_id="c1")


def test_tools_are_not_advertised_where_none_may_be_called(seeing: Assistant, serving: Callable[..., Any]) -> None:
    scripted = Scripted(seeing.model, seeing.shape, seeing.template, [["Hi"]])
    client, _ = serving(scripted)
    post(client, {**QUESTION, "tools": [LOOK_UP], "tool_choice": "none"})
    assert scripted.asked[0].tools == ()


def test_tools_are_refused_where_the_template_has_no_form_for_them(seeing: Assistant, folder: Path) -> None:
    template = load_plugins().chat_templates.get("vicuna")
    reader = Reader("m", template, True, Generation(), Pictures(folder))
    with pytest.raises(Refused, match="chat template, 'vicuna', has no form for tools"):
        reader.read(json.dumps({**QUESTION, "tools": [LOOK_UP]}).encode())


def test_whoever_comes_when_the_queue_is_full_is_told_so(seeing: Assistant, serving: Callable[..., Any]) -> None:
    client, desk = serving(seeing, max_waiting=1)
    with desk.place():
        with desk.place():
            (full,) = post(client, QUESTION)
        (answered,) = post(client, QUESTION)
    assert (full.status_code, full.json()["error"]["code"], answered.status_code) == (503, "queue_full", 200)
    assert desk.in_progress == 0


def test_an_answer_nobody_waits_for_costs_no_more_tokens(seeing: Assistant, folder: Path) -> None:
    pictures = Pictures(folder)
    reader = Reader("m", seeing.template, True, Generation(max_new_tokens=1500), pictures)

    async def leave_after_two_pieces() -> None:
        desk = Desk(seeing, pictures, max_waiting=1)
        job = Job(reader.read(json.dumps({"messages": QUESTION["messages"]}).encode()))
        desk.put(job)
        await job.next()
        await job.next()
        job.leave()
        unheard = Job(reader.read(json.dumps({"messages": QUESTION["messages"]}).encode()))
        unheard.leave()
        desk.put(unheard)
        while desk.cancelled < 2:
            assert desk.answered == 0
            await asyncio.sleep(0.01)
        desk.close()

    with counted(seeing) as passes:
        asyncio.run(leave_after_two_pieces())
    assert 2 <= len(passes) < 1500


def test_a_bug_is_told_without_its_details_and_the_server_goes_on(
    seeing: Assistant, serving: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    scripted = Scripted(seeing.model, seeing.shape, seeing.template, [])
    client, _ = serving(scripted)
    (failed,) = post(client, QUESTION)
    scripted.asked.clear()
    object.__setattr__(scripted, "script", [["Hi"]])
    (answered,) = post(client, QUESTION)
    assert (failed.status_code, failed.json()["error"]["message"]) == (500, "IndexError; see the log of mmft serve")
    assert "a question failed" in caplog.text
    assert answered.json()["choices"][0]["message"]["content"] == "Hi"


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(seeing: Assistant, serving: Callable[..., Any]) -> None:
    def breaks() -> Iterator[str]:
        yield "Hel"
        raise ModelError("the end of it")

    scripted = Scripted(seeing.model, seeing.shape, seeing.template, [breaks()])  # type: ignore[list-item]
    client, _ = serving(scripted)
    (stream,) = post(client, {**QUESTION, "stream": True})
    last = json.loads(stream.text.split("\n\n")[-2].removeprefix("data: "))
    assert (stream.status_code, last["error"]["message"]) == (200, "the end of it")


def test_a_page_of_a_browser_is_let_in_by_its_origin_only(seeing: Assistant, serving: Callable[..., Any]) -> None:
    client, _ = serving(seeing, cors=("https://mine",))
    (mine,) = post(client, QUESTION, headers={"Origin": "https://mine"})
    (other,) = post(client, QUESTION, headers={"Origin": "https://other"})
    assert (mine.status_code, mine.headers["access-control-allow-origin"]) == (200, "https://mine")
    assert (other.status_code, other.json()["error"]["type"]) == (403, "permission_error")
    closed, _ = serving(seeing)
    (refused,) = post(closed, QUESTION, headers={"Origin": "https://mine"})
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)


@pytest.mark.parametrize(
    ("header", "status"), [("Bearer secret", 200), ("Bearer guess", 401), ("secret", 401), ("", 401)]
)
def test_a_key_is_asked_for_everywhere_but_at_the_door(
    seeing: Assistant, serving: Callable[..., Any], header: str, status: int
) -> None:
    client, _ = serving(seeing, api_key="secret")

    async def statuses() -> list[int]:
        headers = {"Authorization": header} if header else {}
        paths = ("/v1/models", "/v1/files", "/health")
        return [(await client.get(f"http://server{path}", headers=headers)).status_code for path in paths]

    assert asyncio.run(statuses()) == [status, status, 200]


def test_a_port_in_use_is_one_clear_error_before_a_model_is_loaded() -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        pytest.raises(MmftError, match=r"^cannot serve on 127\.0\.0\.1:\d+: Address already in use; give another"),
    ):
        bind(ServerOptions(port=taken.getsockname()[1]))


def test_nobody_is_let_wait_for_a_model_that_is_not_loaded_yet() -> None:
    with bind(ServerOptions(port=0)) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())


def test_a_server_for_everybody_without_a_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mmft"):
        bind(ServerOptions(host="0.0.0.0", port=0, api_key="secret")).close()
        assert caplog.text == ""
        bind(ServerOptions(host="0.0.0.0", port=0)).close()
    assert "everybody who reaches this machine can ask; --api-key" in caplog.text


def test_without_its_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MmftError, match=r'^the server needs uvicorn; run: pip install "mmft\[serve\]"$'):
        bind(ServerOptions(port=0))


def test_a_model_is_called_what_its_folder_is_called(tmp_path: Path) -> None:
    for name in ("run/final", "run/checkpoint-5", "hf_model"):
        (tmp_path / name).mkdir(parents=True)
    given = (str(tmp_path / "run/final"), str(tmp_path / "run/checkpoint-5"), str(tmp_path / "hf_model"), "org/model")
    assert [served_name(name) for name in given] == ["run", "run/checkpoint-5", "hf_model", "org/model"]


def test_another_engine_is_told_the_options_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    line, surroundings = command("vllm", "org/model", {"port": 9, "api_key": "secret", "dtype": "bf16", "name": "m"})
    assert line[1:3] == ["serve", "org/model"]
    assert "--port 9 --dtype bfloat16 --served-model-name m" in " ".join(line)
    assert (surroundings, "secret" in line) == ({"VLLM_API_KEY": "secret"}, False)
    line, _ = command("transformers", "org/model", {})
    assert line[1:] == [
        "-m",
        "transformers.cli.transformers",
        "serve",
        "org/model",
        *("--host", "127.0.0.1", "--port", "8000"),
    ]


@pytest.mark.parametrize(
    ("engine", "model", "options", "message"),
    [
        ("transformers", None, {}, "--engine transformers needs a MODEL"),
        ("transformers", "org/model", {"api_key": "x"}, "--api-key: transformers has no such option; leave it out, or"),
        ("vllm", "org/model", {"max_waiting": 1}, "--max-waiting: vllm has no such option"),
        ("vllm", "run", {}, "vllm does not open; mmft convert hf .*run OUT, then mmft serve OUT --engine vllm"),
        ("vllm", "org/model", {}, "vllm is not installed here; where it is: vllm serve org/model"),
    ],
)
def test_another_engine_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, model: str | None, options: Any, message: str
) -> None:
    (tmp_path / "run/final").mkdir(parents=True)
    (tmp_path / "run/final/mmft.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ModelError, match=message):
        command(engine, model, options)

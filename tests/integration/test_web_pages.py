"""Pages of this process: two models beside each other, other languages, the queue's bound, passwords, and the turns."""

import json
import socket
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, expect
from web_visitors import BOX, NO_PROXY, Client, chromium, load, served, visiting, wait_until

from mmft.chat.tools import ToolUse
from mmft.chat.web.options import PageOptions, ServeOptions, example_pictures, logins, short_names
from mmft.chat.web.server import bind, launch
from mmft.chat.web.turns import Answer, Seat, Style, Turn, answered, edited, history, shown, turn_at
from mmft.chat.web.words import WORDS, say
from mmft.cli.talk import web
from mmft.errors import MmftError
from mmft.inference import Assistant, Generation
from mmft.types import ToolCall


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", autouse=True)
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield


@pytest.fixture(scope="module")
def reading(tiny_text_run: Path) -> Assistant:
    return load(tiny_text_run)


def test_two_models_answer_one_question_each_with_its_own_history(
    browser: Browser, tiny_run: Path, reading: Assistant
) -> None:
    seats = [Seat("sees", load(tiny_run)), Seat("reads", reading)]
    generation = Generation(max_new_tokens=20)
    with served(seats, generation=generation) as address, visiting(browser, address) as visitor:
        assert visitor.page.locator("#chats h2").all_inner_texts() == ["sees", "reads"]
        visitor.attach(tiny_run.parent / "red.png")
        visitor.ask("What is it?")
        visitor.expect_answers("A picture.")
        refused = (
            "⚠ not answered: red.png: this is a text model, it takes no pictures; train one with model.vision to ask"
        )
        visitor.expect_answers(refused, column=1)
        visitor.ask("Again?")
        expect(visitor.page.locator("#chat-0 [data-testid=bot]")).to_have_count(2)
        visitor.expect_answers(refused, "Again what?", column=1)  # to this model it is the first question
        visitor.start_anew()
        visitor.ask("Say hello.")
        for column in (0, 1):
            visitor.expect_answers("Hello there.", column=column)
        expect(visitor.page.locator(BOX)).to_be_enabled()
        visitor.page.locator("#chat-1").get_by_role("button", name="Edit").click()
        visitor.page.locator(".edit-textarea").fill("Again?")
        visitor.page.locator("#chat-1").get_by_role("button", name="Submit").click()
        for column in (0, 1):
            visitor.expect_answers("Again what?", column=column)
        expect(visitor.page.locator(BOX)).to_be_enabled()
        visitor.page.locator("#chat-1").get_by_role("button", name="Retry").click()
        for column in (0, 1):
            visitor.expect_answers("Again what?", column=column)


def test_the_page_speaks_chinese_to_a_chinese_browser_or_where_it_is_told_to(
    browser: Browser, reading: Assistant
) -> None:
    for options, locale in (({}, "zh-CN"), ({"language": "zh"}, "en-US")):
        with served([Seat("reads", reading)], **options) as address, visiting(browser, address, locale) as visitor:
            expect(visitor.page.get_by_role("button", name="新对话")).to_be_visible()
            expect(visitor.page.locator(BOX)).to_have_attribute("placeholder", "输入问题")
            visitor.page.get_by_role("button", name="你是谁？").click()
            expect(visitor.page.locator(BOX)).to_have_value("你是谁？")
            visitor.page.get_by_role("button", name="设置").click()
            visitor.page.get_by_label("随机种子").fill("x")
            visitor.ask("你是谁？")
            visitor.expect_answers("⚠ 未能回答: seed=x: allowed is a whole number")
            expect(visitor.page.locator(BOX)).to_be_enabled()
            buttons = visitor.page.locator("#chat-0 button:visible")
            expect(buttons).to_have_count(2)
            labels = [button.get_attribute("aria-label") for button in buttons.all()]
            assert labels in (["编辑", "重试"], ["Edit", "Retry"])


def test_turns_once_dropped_stay_dropped_and_what_was_computed_is_used_again(reading: Assistant) -> None:
    seat, style = Seat("reads", reading), Style(generation=Generation(max_new_tokens=20), max_context=160)
    turns: tuple[Turn, ...] = ()
    reused, dropped = [], []
    for _ in range(12):
        *_, turn = answered([seat], style, Turn("Say hello."), turns)
        turns = (*turns, turn)
        assert seat.memory.usage is not None
        reused.append(seat.memory.usage.reused_tokens / seat.memory.usage.prompt_tokens)
        dropped.append(turn.answers[0].notice is not None)
    assert 0 < sum(dropped) < 6, "turns are dropped, and not anew with every question"
    after = [share for share, drop in zip(reused, dropped, strict=True) if not drop][1:]
    assert min(after) > 0.5
    assert (len(shown(turns)), len(history(turns)) < len(turns) * 2) == (24 + sum(dropped), True)


def test_a_stopped_answer_is_told_to_the_model_and_an_error_is_not() -> None:
    stopped, wrong = Answer(("Hel",)), Answer(error="no such file")
    turns = (Turn("Hi", answers=(stopped,)), Turn("See?", ("a.png",), (wrong,)))
    assert [(message.role, message.text) for message in history(turns)] == [("user", "Hi"), ("assistant", "Hel")]


def test_a_folded_use_of_a_tool_says_how_its_result_begins_and_whether_it_failed() -> None:
    uses = (
        ToolUse(ToolCall("calculate", {}), "126"),
        ToolUse(ToolCall("search", {}), "no answer\n" * 40, failed=True),
        ToolUse(ToolCall("search", {}), "x" * 400),
    )
    titles = [part["metadata"]["title"] for part in shown([Turn("Hi", answers=(Answer(uses),))])[1:]]
    assert titles[0] == "⚙ calculate → 126"
    assert titles[1].startswith("⚠ search → no answer no answer") and titles[1].endswith(" …") and len(titles[1]) < 80
    assert len(titles[2]) < 80


def test_the_use_of_a_tool_is_shown_where_it_happened_and_as_text() -> None:
    use = ToolUse(ToolCall("<b>x</b>", {"text": "<img src=x onerror=window.ran=1>"}), "<script>window.ran=2</script>")
    messages = shown([Turn("Hi", answers=(Answer(("One ", use, "moment.")),))])
    assert [part["role"] for part in messages] == ["user", "assistant", "assistant", "assistant"]
    assert messages[2]["metadata"]["title"] == "⚙ <\u2060b>x<\u2060/b> → <\u2060script>window.ran=2<\u2060/script>"
    text = "text: &lt;img src=x onerror=window.ran=1&gt;\n→ &lt;script&gt;window.ran=2&lt;/script&gt;"
    assert messages[2]["content"] == [{"type": "text", "text": text}]


def test_a_text_too_long_for_everybody_else_is_refused(reading: Assistant) -> None:
    *_, turn = answered([Seat("reads", reading)], Style(language="zh"), Turn("字" * 200_001))
    assert turn.answers[0].error == "文本有 200,001 个字符，最多允许 200,000 个，请缩短"


def test_an_edited_message_is_found_and_freed_of_what_made_it_harmless() -> None:
    given = Answer(("yes",))
    turns = (Turn("a < b && <i>", ("x.png",), (given,)), Turn("two", answers=(given,)))
    messages = shown(turns)
    assert [turn_at(turns, place) for place in range(len(messages))] == [0, 0, 0, 1, 1]
    assert (turn_at(turns, len(messages)), turn_at(turns, -1), turn_at((), 0)) == (None, None, None)
    assert (messages[1]["content"][0]["text"], edited("a < b && <\u2060i>")) == ("a < b && <\u2060i>", turns[0].text)


def test_only_who_has_a_password_comes_in(reading: Assistant) -> None:
    with served([Seat("reads", reading)], auth=["ann:a:b", "bob:c"]) as address:
        for path in ("config", "gradio_api/queue/data?session_hash=x"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                NO_PROXY.open(f"{address}/{path}")
            assert refused.value.code == 401
        for login, accepted in (("username=ann&password=a:b", True), ("username=ann&password=c", False)):
            try:
                assert json.load(NO_PROXY.open(f"{address}/login", login.encode())) == {"success": True}
                assert accepted
            except urllib.error.HTTPError as error:
                assert (error.code, accepted) == (400, False)


def test_uploads_have_a_bound_together_and_the_server_goes_on(
    reading: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with served([Seat("reads", reading)]) as address:  # --max-upload 1
        client = Client(address)
        client.upload("a.png", bytes(900_000))
        with (tmp_path / "of others").open("wb") as file:
            file.truncate(98_500_000)
        with pytest.raises(urllib.error.HTTPError) as refused:
            client.upload("b.png", bytes(900_000))
        line = "all uploads together may have 100,000,000 bytes, and there is no room for this one; try tomorrow"
        assert (refused.value.code, refused.value.read().decode()) == (413, line)
        assert sum(path.stat().st_size == 900_000 for path in tmp_path.rglob("*.png")) == 1
        (tmp_path / "of others").unlink()
        client.upload("b.png", bytes(900_000))


def test_what_was_downloaded_goes_with_the_page_it_was_asked_from(
    browser: Browser, reading: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with served([Seat("reads", reading)]) as address:
        with visiting(browser, address) as visitor:
            for number in (1, 2):
                visitor.ask("Say hello.")
                expect(visitor.page.locator("[data-testid=bot]")).to_have_count(number)
                expect(visitor.page.get_by_role("button", name="New chat")).to_be_enabled()
                with visitor.page.expect_download() as download:
                    visitor.page.get_by_role("button", name="Download").click()
                assert Path(download.value.path()).read_text("utf-8").count("Say hello.") == number
                assert len(list(tmp_path.rglob("conversation*"))) == 1
        wait_until(lambda: not list(tmp_path.rglob("conversation*")))


@pytest.mark.parametrize(
    ("auth", "line"), [(["ann"], "not USER:PASSWORD"), (["ann:"], "neither empty"), (["a:b", "a:c"], "given twice")]
)
def test_a_login_that_is_wrong_is_refused_without_its_password(auth: list[str], line: str) -> None:
    with pytest.raises(MmftError, match=line) as refused:
        logins(auth)
    assert "b" not in str(refused.value).replace("be", "") or auth[0] != "a:b"


def test_passwords_are_taken_from_the_environment(tmp_path: Path) -> None:
    result = CliRunner().invoke(web, [str(tmp_path)], env={"MMFT_WEB_AUTH": "ann:secret bob"})
    assert "not USER:PASSWORD" in str(result.exception) and "secret" not in str(result.exception)


def test_a_port_in_use_is_one_clear_error() -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        pytest.raises(
            MmftError, match=r"^cannot serve on 127\.0\.0\.1:\d+: Address already in use; give another --port"
        ),
    ):
        bind(ServeOptions(port=taken.getsockname()[1]))


def test_a_port_taken_while_the_model_is_loaded_is_the_same_error(reading: Assistant) -> None:
    from mmft.chat.web.page import build_page

    line = r"^cannot serve on 127\.0\.0\.1:\d+: Address already in use; give another --port or --host$"
    with bind(options := ServeOptions(port=0)) as bound:
        with pytest.raises(ConnectionRefusedError):  # nobody waits for the model
            socket.create_connection(bound.getsockname())
        page, port = build_page([Seat("reads", reading)], PageOptions()), bound.getsockname()[1]
        with closing(socket.create_server(("127.0.0.1", port))), pytest.raises(MmftError, match=line):
            launch(page, options, bound)


def test_without_gradio_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MmftError, match=r'^the page needs gradio; run: pip install "mmft\[web\]"$'):
        bind(ServeOptions(port=0))


def test_models_are_named_by_what_tells_them_apart() -> None:
    assert short_names(["work_dirs/base/final", "work_dirs/tuned/final"]) == ["base", "tuned"]
    assert short_names(["a/run/final", "b/run/final"]) == ["a/run", "b/run"]
    assert short_names(["work_dirs/tuned/checkpoint-90"]) == ["tuned/checkpoint-90"]
    assert short_names(["org/model"]) == ["model"]


def test_a_folder_without_pictures_has_no_examples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    for folder, line in ((tmp_path, "no pictures in it"), (tmp_path / "x", "no such folder")):
        with pytest.raises(MmftError, match=line):
            example_pictures(folder)
    (tmp_path / "b.JPG").write_bytes(b"")
    assert example_pictures(tmp_path) == [tmp_path / "b.JPG"]


def test_every_sentence_of_the_page_is_there_in_both_languages() -> None:
    values = {"most": 1, "found": 1, "error": "x"}
    for key, (english, chinese) in WORDS.items():
        assert english and chinese and english.count("{") == chinese.count("{")
        assert say("en", key, **values) and say("zh", key, **values)

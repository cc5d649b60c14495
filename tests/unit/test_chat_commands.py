"""What the lines of a chat do."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from chat_models import SHORT, make_assistant
from click.testing import CliRunner
from PIL import Image as PILImage

from mmft.chat import session as session_module
from mmft.chat.commands import Talk, changed
from mmft.chat.keyboard import Keyboard
from mmft.chat.session import ChatSession, answer
from mmft.chat.terminal import note, run_terminal
from mmft.chat.transcript import write_transcript
from mmft.cli.talk import chat
from mmft.errors import DataError, MmftError
from mmft.inference import Assistant, Generation, user_message
from mmft.types import Conversation, Message, Text


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return make_assistant(tmp_path_factory.mktemp("seeing"), sees=True)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PILImage.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


class Spoken:
    """A talk, and everything it said: what was asked, and the notes."""

    def __init__(self, assistant: Assistant, *images: Path) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.notes: list[str] = []
        self.session = ChatSession(assistant, SHORT)
        self.talk = Talk(self.session, assistant, images, ask=self._ask, note=self.notes.append)

    def _ask(self, text: str, images: Sequence[Path]) -> None:
        self.asked.append((text, [image.name for image in images]))
        list(self.session.ask(text, images))


def test_a_picture_goes_with_the_next_question_and_those_of_the_start_come_back(
    seeing: Assistant, picture: Path
) -> None:
    spoken = Spoken(seeing, picture)
    other = picture.with_name("other picture.png")
    other.write_bytes(picture.read_bytes())
    for line in ("What?", "And?", f"/image '{other}'", f"/image {other}", "Two?", "/reset", "Again?", "RESET"):
        spoken.talk.take(line)
    assert spoken.asked == [
        ("What?", ["red.png"]), ("And?", []), ("Two?", ["other picture.png"] * 2), ("Again?", ["red.png"]),
    ]  # fmt: skip
    assert spoken.session.conversation.messages == ()


def test_the_system_text_is_set_shown_and_taken_away(seeing: Assistant) -> None:
    spoken = Spoken(seeing)
    for line in ("/system", "/system Be brief.", "/system", "/system -"):
        spoken.talk.take(line)
    assert spoken.notes == [
        "system text: that of the template", "system text: Be brief.", "system text: Be brief.",
        "system text: that of the template",
    ]  # fmt: skip


def test_parameters_are_shown_and_set(seeing: Assistant) -> None:
    spoken = Spoken(seeing)
    spoken.talk.take("/params temperature=0.7 seed=3 top_k=5")
    assert spoken.notes[-1] == "max_new_tokens=12  temperature=0.7  top_p=1.0  top_k=5  repetition_penalty=1.0  seed=3"
    spoken.talk.take("/params seed=none")
    assert spoken.session.generation == Generation(max_new_tokens=12, temperature=0.7, top_k=5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("temprature=1", "'temprature' is no setting; did you mean 'temperature'?; there are max_new_tokens, "),
        ("stop=x", "'stop' is no setting"),
        ("top_k=1.5", "top_k=1.5: top_k is a whole number"),
        ("temperature", "temperature: temperature is a number"),
        ("top_p=2", "top_p=2.0: allowed is above 0, at most 1"),
        ("temperature=1e-45", "temperature=1e-45: allowed is 0 (greedy), or 0.0001 or more"),
        ("temperature=nan", "temperature=nan: allowed is 0 (greedy), or 0.0001 or more"),
        ("repetition_penalty=1e-45", "repetition_penalty=1e-45: allowed is 0.0001 to 10000; 1 is none"),
    ],
)
def test_a_parameter_that_cannot_be_is_one_line(setting: str, message: str) -> None:
    with pytest.raises(MmftError) as raised:
        changed(SHORT, [setting])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("temperature", "penalty"), [(1e-4, 1.0), (1e-4, 1e-4), (1e-4, 1e4), (1e300, 1.0)])
def test_the_least_and_the_most_that_is_allowed_gives_an_answer(
    seeing: Assistant, temperature: float, penalty: float
) -> None:
    generation = Generation(max_new_tokens=4, temperature=temperature, repetition_penalty=penalty, seed=1)
    assert isinstance(seeing.answer(Conversation((user_message("Hello"),)), generation), str)


def test_a_saved_conversation_goes_on_where_it_was(seeing: Assistant, picture: Path, tmp_path: Path) -> None:
    first, second = Spoken(seeing, picture), Spoken(seeing)
    for line in ("/system Be brief.", "What is it?", f"/save {tmp_path / 'talk.json'}"):
        first.talk.take(line)
    second.talk.take(f"/load {tmp_path / 'talk.json'}")
    assert second.session.conversation == first.session.conversation
    assert "".join(second.session.ask("And?")) == "".join(first.session.ask("And?"))
    content = json.loads((tmp_path / "talk.json").read_text("utf-8"))["messages"]
    assert [message["role"] for message in content] == ["system", "user", "assistant"]
    assert content[1]["content"][0] == {"type": "image", "path": str(picture)}


def test_a_conversation_whose_picture_is_gone_is_refused_when_it_is_loaded(
    seeing: Assistant, picture: Path, tmp_path: Path
) -> None:
    write_transcript(tmp_path / "talk.json", Conversation((user_message("?", [picture]), answer("red"))))
    picture.unlink()
    spoken = Spoken(seeing)
    with pytest.raises(DataError, match=r"red\.png: no such image file"):
        spoken.talk.take(f"/load {tmp_path / 'talk.json'}")
    assert spoken.session.conversation.messages == ()


@pytest.mark.parametrize(
    "content", ["[" * 200_000, '{"messages": [{"role": "user", "content": "\\ud800"}]}', '{"messages": [{}]}']
)
def test_a_conversation_goes_on_after_another_could_not_be_loaded(
    seeing: Assistant, tmp_path: Path, content: str
) -> None:
    (tmp_path / "talk.json").write_text(content, "utf-8")
    spoken = Spoken(seeing)
    for line in ("/system Be brief.", "Hello"):
        spoken.talk.take(line)
    before = spoken.session.conversation
    with pytest.raises(DataError):
        spoken.talk.take(f"/load {tmp_path / 'talk.json'}")
    assert spoken.session.conversation == before
    spoken.talk.take("And?")
    assert len(spoken.session.conversation.messages) == 5


def test_a_conversation_that_no_question_could_follow_is_not_loaded(seeing: Assistant, tmp_path: Path) -> None:
    def refuses(conversation: Conversation, **options: object) -> str:
        if any(message.role == "tool" for message in conversation.messages):
            raise DataError("no form for results")
        return str(seeing.template.render(conversation, **options))  # type: ignore[arg-type]

    assistant = replace(seeing, template=replace(seeing.template, render=refuses))
    spoken = Spoken(assistant)
    spoken.session.reset([Message("user", (Text("Hello"),)), answer("Hi")])
    before = spoken.session.conversation
    write_transcript(tmp_path / "talk.json", Conversation((*before.messages, Message("tool", (Text("None"),)))))
    with pytest.raises(DataError, match="no form for results"):
        spoken.talk.take(f"/load {tmp_path / 'talk.json'}")
    assert spoken.session.conversation == before


@pytest.mark.parametrize("line", ["/imge x.png", "/nonsense", "/sytem Be brief."])
def test_a_mistyped_command_is_not_sent_to_the_model(seeing: Assistant, line: str) -> None:
    with pytest.raises(MmftError, match=f"^no command {line.split()[0]}; there are /image, /reset, "):
        Spoken(seeing).talk.take(line)


@pytest.mark.parametrize("line", ["/etc/passwd is what?", "/etc/passwd", "EXIT now", "/* note */", "/r and others"])
def test_what_only_looks_like_a_command_is_a_question(seeing: Assistant, line: str) -> None:
    spoken = Spoken(seeing)
    spoken.talk.take(line)
    assert spoken.asked == [(line, [])]


def test_the_help_names_every_command(seeing: Assistant) -> None:
    spoken = Spoken(seeing)
    spoken.talk.take("/help")
    assert [line.split()[0] for line in spoken.notes[0].splitlines()] == list(spoken.talk.commands)


def typed(monkeypatch: pytest.MonkeyPatch, text: str, *, multiline: bool) -> list[str]:
    """The questions of a keyboard without line editing, of which the last line ends with Ctrl-D."""
    monkeypatch.setattr(sys, "stdin", StringIO(text))
    keyboard = Keyboard(["/reset", "EXIT"], lambda command: False, multiline=multiline)
    return list(keyboard.questions(lambda text: None))


def test_without_line_editing_a_question_is_a_line_or_ends_with_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one\n\n/reset\ntwo\nlines\n\n"
    assert typed(monkeypatch, text, multiline=False) == ["one", "", "/reset", "two", "lines", ""]
    assert typed(monkeypatch, text, multiline=True) == ["one", "/reset", "two\nlines"]


def test_the_whole_of_stdin_is_one_question(
    seeing: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("two\nlines\n"))
    assert run_terminal(seeing, SHORT, message="-") == 0
    assert capsys.readouterr().out.rstrip("\n") == "".join(ChatSession(seeing, SHORT).ask("two\nlines"))


def test_each_answer_is_a_line_of_json(
    seeing: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("Hello\n/nonsense\n\udcff\nAgain\n"))
    assert run_terminal(seeing, SHORT, images=[picture], as_json=True) == 2
    out, err = capsys.readouterr()
    first, unknown, refused, second = (json.loads(line) for line in out.splitlines())
    assert list(unknown) == ["error"] and unknown["error"].startswith("no command /nonsense; there are ")
    assert list(first) == ["answer", "finish", "prompt_tokens", "reused_tokens", "answer_tokens"]
    assert refused == {"error": "the question is not UTF-8 text (at character 0)"}
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert err.startswith("error: no command /nonsense; there are ")


def test_without_commands_every_line_is_a_question(
    seeing: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "precious.txt"
    target.write_text("mine")
    monkeypatch.setattr(sys, "stdin", StringIO(f"/save {target}\nEXIT\n/nonsense\nRESET\nHello\n"))
    assert run_terminal(seeing, SHORT, as_json=True, commands=False) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(line)) for line in lines] == ["answer"] * 5
    assert target.read_text() == "mine"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_bug_ends_one_answer_and_not_the_chat(
    seeing: Assistant, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def breaks(conversation: Conversation, **options: object) -> object:
        if "Break" in conversation.messages[-1].text:
            raise RuntimeError("probability tensor\ncontains inf")
        asked.append(len(conversation.messages))
        return seeing.template.render(conversation, **options)  # type: ignore[arg-type]

    asked: list[int] = []
    assistant = replace(seeing, template=replace(seeing.template, render=breaks))
    monkeypatch.setattr(sys, "stdin", StringIO("Hello\nBreak\nAgain\n"))
    assert run_terminal(assistant, SHORT, as_json=as_json) == 2
    out, err = capsys.readouterr()
    assert err.count("error: RuntimeError: probability tensor contains inf\n") == err.count("error") == 1
    assert ('{"error": "RuntimeError: probability tensor contains inf"}' in out) == as_json
    assert len(out.splitlines()) >= 2 and set(asked) == {1, 3}
    assert "a line of the chat failed" in caplog.text and "Traceback" in caplog.text


def test_a_full_context_is_told_on_stderr(
    seeing: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("A question of some length\n" * 8))
    assert run_terminal(seeing, SHORT, max_context=150) == 0
    out, err = capsys.readouterr()
    assert "the context of 150 tokens is full: " in err and "context" not in out


def test_a_file_of_100_mb_is_refused_before_it_is_read(
    seeing: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(100_000_000)
    monkeypatch.setattr(session_module, "open_image", lambda path: pytest.fail("it was opened"))
    with pytest.raises(DataError, match=r"huge\.png: 100,000,000 bytes; a picture of at most 50,000,000 is taken"):
        ChatSession(seeing, SHORT).ask("What is it?", [tmp_path / "huge.png"])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_bomb_is_refused_before_a_pixel_is_decoded(seeing: Assistant, tmp_path: Path) -> None:
    PILImage.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    with pytest.raises(DataError, match=r"bomb\.png: .*pixels; at most 89,478,485 are allowed"):
        ChatSession(seeing, SHORT).ask("What is it?", [tmp_path / "bomb.png"])


def test_no_note_writes_control_sequences_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    note("\x1b]0;owned\x07\x9b31mred.png\tis 红\n")
    assert capsys.readouterr().err == "\ufffd]0;owned\ufffd\ufffd31mred.png\tis 红\n\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--system", "x", "--system-template", "alpaca"], "--system and --system-template both give a system text"),
        (["--system-template", "alpacca"], "no system text named 'alpacca'; did you mean 'alpaca'?"),
        (["--top-p", "5"], "top_p=5.0: allowed is above 0, at most 1"),
        (["--bits", "5"], "'5' is not one of '4', '8', '16'"),
    ],
)
def test_a_wrong_option_is_told_before_a_model_is_loaded(options: list[str], message: str) -> None:
    result = CliRunner().invoke(chat, ["no/model", *options])
    assert message in result.output + str(result.exception)
    assert result.exit_code != 0

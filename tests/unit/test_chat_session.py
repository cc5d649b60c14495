"""The rules of a conversation, with a random but real model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_models import SHORT, make_assistant
from PIL import Image as PILImage

from mmft.chat.session import ChatSession
from mmft.chat.terminal import run_terminal
from mmft.errors import DataError
from mmft.inference import Assistant, Generation, user_message
from mmft.types import Text
from mmft_plugins._llava_maps import llava


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return make_assistant(tmp_path_factory.mktemp("seeing"), sees=True)


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return make_assistant(tmp_path_factory.mktemp("reading"), sees=False)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        PILImage.effect_noise((30, 20), 90).save(path)
    return paths


def said(session: ChatSession) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in session.conversation.messages]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_question_has_the_form_of_a_training_question(number: int) -> None:
    images = ["a.png", "b.png"][:number]
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
    sample = llava({"conversations": turns, **({"image": images} if images else {})})
    assert sample is not None
    assert user_message("What is it?", images) == sample.messages[0]


def test_the_pieces_are_the_answer_and_both_turns_are_kept(seeing: Assistant, pictures: list[Path]) -> None:
    session = ChatSession(seeing, SHORT)
    answers = []
    for text, images in (("What is it?", pictures), ("And now?", [])):
        asked = (*session.conversation.messages, user_message(text, images))
        expected = seeing.answer(type(session.conversation)(asked), SHORT)
        assert "".join(session.ask(text, images)) == expected != ""
        answers.append(expected)
    assert said(session) == [
        ("user", "\n\nWhat is it?"), ("assistant", answers[0]), ("user", "And now?"), ("assistant", answers[1])
    ]  # fmt: skip


def test_nothing_is_kept_before_the_answer_is_complete(reading: Assistant) -> None:
    session = ChatSession(reading, SHORT)
    pieces = session.ask("Hello")
    next(pieces)
    assert said(session) == []
    list(pieces)
    assert len(said(session)) == 2


def test_a_cancelled_answer_is_kept_as_far_as_it_got(reading: Assistant) -> None:
    session = ChatSession(reading, Generation(max_new_tokens=400))
    pieces = session.ask("Hello")
    partial = next(pieces) + next(pieces)
    pieces.close()
    assert said(session) == [("user", "Hello"), ("assistant", partial)]
    assert len(partial) < len(reading.answer(ChatSession(reading, history=[user_message("Hello")]).conversation))


def test_an_answer_cancelled_before_it_began_leaves_no_trace(reading: Assistant) -> None:
    session = ChatSession(reading, SHORT)
    session.ask("Hello").close()
    assert said(session) == []


def test_an_error_while_answering_leaves_no_trace(seeing: Assistant, pictures: list[Path]) -> None:
    session = ChatSession(seeing, SHORT)
    pieces = session.ask("What is it?", pictures)
    pictures[0].unlink()
    with pytest.raises(DataError, match=r"a\.png: no such image file"):
        next(pieces)
    assert said(session) == []


def test_a_bad_picture_is_refused_before_the_model_runs(seeing: Assistant, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    session = ChatSession(seeing, SHORT)
    with pytest.raises(DataError, match=r"bad\.png: not an image; allowed are PNG"):
        session.ask("What is it?", [tmp_path / "bad.png"])
    assert said(session) == []


def test_a_text_model_refuses_pictures(reading: Assistant, pictures: list[Path]) -> None:
    with pytest.raises(DataError, match=r"a\.png: this is a text model, it takes no pictures"):
        ChatSession(reading, SHORT).ask("What is it?", pictures)


def test_a_reset_forgets_the_turns_and_keeps_the_system_text(reading: Assistant) -> None:
    session = ChatSession(reading, SHORT, system="Be brief.")
    first = "".join(session.ask("Hello"))
    session.reset()
    assert said(session) == [("system", "Be brief.")]
    assert "".join(session.ask("Hello")) == first


@pytest.mark.parametrize(("text", "message"), [(" \n", "the question is empty"), ("a\udcff", "not UTF-8 text .*1")])
def test_a_question_without_readable_text_is_refused(reading: Assistant, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatSession(reading, SHORT).ask(text)


def test_a_picture_needs_no_words(pictures: list[Path]) -> None:
    assert user_message("", pictures[:1]).parts[1:] == (Text("\n"),)


def test_one_shot_errors_write_nothing_to_stdout(seeing: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: no such image file"):
        run_terminal(seeing, SHORT, images=[Path("nowhere.png")], message="What is it?", system=None)
    assert capsys.readouterr().out == ""


def test_a_wrong_picture_on_the_command_line_ends_the_chat_at_its_start(seeing: Assistant) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: no such image file"):
        run_terminal(seeing, SHORT, images=[Path("nowhere.png")], message=None, system=None)


def test_the_model_is_free_again_once_an_answer_is_closed(reading: Assistant) -> None:
    pieces: Iterator[str] = ChatSession(reading, Generation(max_new_tokens=400)).ask("Hello")
    next(pieces)
    del pieces
    assert "".join(ChatSession(reading, SHORT).ask("Hello"))

"""When the context is full, the oldest turns go, whole, and the user is told."""

from pathlib import Path

import pytest
from chat_models import SHORT, make_assistant
from PIL import Image as PILImage

from mmft.chat.context import fitted, grouped
from mmft.chat.session import ChatSession, answer
from mmft.errors import DataError
from mmft.inference import Assistant, Generation, user_message
from mmft.types import Conversation, Message, Text


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return make_assistant(tmp_path_factory.mktemp("seeing"), sees=True)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PILImage.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_the_oldest_turns_go_with_their_pictures_and_the_system_text_stays(seeing: Assistant, picture: Path) -> None:
    notices: list[str] = []
    session = ChatSession(seeing, SHORT, system="Be brief.", max_context=200, notify=notices.append)
    for number in range(8):
        list(session.ask(f"Question number {number}", [picture] if number == 0 else []))
    messages = session.conversation.messages
    assert messages[0] == Message("system", (Text("Be brief."),))
    assert messages[1].role == "user" and messages[-2].text == "Question number 7"
    assert session.conversation.images == ()
    assert notices and notices[0].startswith("the context of 200 tokens is full: the ")
    assert len(seeing.prompt(session.conversation)) <= 200


def test_a_quarter_is_free_again_so_that_not_every_question_drops_a_turn(seeing: Assistant) -> None:
    turns = [m for n in range(20) for m in (user_message(f"Question {n}"), answer("An answer."))]
    asked = user_message("Last?")
    fit = fitted(seeing, (), turns, asked, 12, 300)
    length = len(seeing.prompt(Conversation((*fit.turns, asked))))
    one_more = turns[2 * fit.dropped - 2 :]
    assert length <= 0.75 * (300 - 12) < len(seeing.prompt(Conversation((*one_more, asked))))
    assert fit.turns == tuple(turns[2 * fit.dropped :])


def test_what_fits_is_left_alone(seeing: Assistant) -> None:
    turns = (user_message("Hello"), answer("Hi."))
    for limit in (None, 2048):
        fit = fitted(seeing, (), turns, user_message("Again?"), 12, limit)
        assert (fit.turns, fit.dropped, fit.max_new_tokens) == (turns, 0, 12)


def test_an_answer_ends_where_the_context_does(seeing: Assistant) -> None:
    session = ChatSession(seeing, Generation(max_new_tokens=5000), max_context=100)
    list(session.ask("Hello"))
    assert session.usage is not None
    assert session.usage.prompt_tokens + session.usage.answer_tokens <= 100
    assert session.usage.finish in ("length", "stop")


def test_the_models_own_positions_are_the_limit(seeing: Assistant) -> None:
    assert seeing.max_context == 2048
    with pytest.raises(DataError, match=r"the question takes [\d,]+ tokens .* the context has 2,048; make it shorter"):
        ChatSession(seeing, SHORT, max_context=10_000).ask("word " * 4000)


def test_a_question_that_never_fits_leaves_the_conversation_as_it_was(seeing: Assistant) -> None:
    session = ChatSession(seeing, SHORT, max_context=150)
    list(session.ask("Hello"))
    before = session.conversation
    with pytest.raises(DataError, match="the context has 150"):
        session.ask("word " * 300)
    assert session.conversation == before


def test_a_turn_is_a_question_with_all_that_follows_it() -> None:
    tool = Message("tool", (Text("4"),))
    turns = [user_message("2+2?"), answer("calling"), tool, answer("4"), user_message("Thanks"), answer("Sure")]
    assert [len(group) for group in grouped(turns)] == [4, 2]
    assert [len(group) for group in grouped(turns[1:])] == [3, 2]

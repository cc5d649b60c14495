"""What becomes of a question on the page when its turn and the stop button come in any order."""

import pytest

from mmft.chat.web.asked import Asked
from mmft.chat.web.turns import Turn


@pytest.fixture
def asked() -> Asked:
    return Asked(Turn("Hi"), 0)


def test_an_answer_that_is_stopped_ends_itself_and_gives_up_no_place(asked: Asked) -> None:
    assert asked.begin() and asked.answering and not asked.stopped
    assert not asked.stop()
    assert asked.answering and asked.stopped and not asked.ended
    asked.end()
    assert asked.ended and not asked.answering


def test_a_question_stopped_while_it_waits_gives_up_its_place_and_is_never_answered(asked: Asked) -> None:
    assert asked.stop()
    assert not asked.answering and not asked.ended
    assert asked.stop(), "the first word to the queue may be lost"
    assert not asked.begin()
    assert asked.ended, "its place came all the same, so the page is told of its end"


def test_after_the_end_neither_the_stop_button_nor_a_second_place_does_anything(asked: Asked) -> None:
    assert asked.begin()
    asked.end()
    assert not asked.stop() and not asked.begin()
    assert asked.ended and not asked.stopped

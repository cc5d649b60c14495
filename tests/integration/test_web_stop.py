"""Answers that are stopped: what stays of them, and that the page and the model are free for the next question."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect
from web_visitors import BOX, STOP, Visitor, chromium, load, served, visiting

from mmft.chat.transcript import read_transcript
from mmft.chat.web.turns import Seat
from mmft.inference import Assistant, Generation

pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
BOT = "[data-testid=bot]"


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


@pytest.fixture
def endless(reading: Assistant) -> Iterator[str]:
    """The page of a model that repeats itself and never ends, so that it answers again only once it was stopped."""
    config = reading.model.causal_lm.config
    before, config.max_position_embeddings = config.max_position_embeddings, 200_000
    generation = Generation(max_new_tokens=100_000, repetition_penalty=0.01)
    with served([Seat("reads", reading)], generation=generation, max_waiting=1) as address:
        yield address
    config.max_position_embeddings = before


def is_being_answered(visitor: Visitor, number: int = 0) -> str:
    """What was written so far of an answer that has a stop button and grows."""
    answer = visitor.page.locator(BOT).nth(number)
    expect(answer).not_to_be_empty()
    written = answer.inner_text().rstrip()
    expect(answer).not_to_have_text(written)
    expect(visitor.page.locator(STOP)).to_be_visible()
    expect(visitor.page.locator(BOX)).to_be_disabled()
    return written


def stop(visitor: Visitor) -> None:
    visitor.page.locator(STOP).click()
    expect(visitor.page.locator(BOX)).to_be_enabled()


def set_length(visitor: Visitor, tokens: int) -> None:
    """Of the answers to come."""
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("number input for Most new tokens").fill(str(tokens))
    visitor.page.get_by_role("button", name="Toggle Sidebar").click()


def test_stop_keeps_what_was_written_and_frees_the_model(browser: Browser, endless: str) -> None:
    with visiting(browser, endless) as visitor, visiting(browser, endless) as other:
        assert visitor.page.locator("input[type=file]").count() == 0  # a text model has no control for pictures
        visitor.ask("Say hello.")
        answer = visitor.page.locator(BOT)
        written = is_being_answered(visitor)
        stop(visitor)
        other.ask("Say hello.")
        is_being_answered(other)  # the model is free
        kept = answer.inner_text()
        assert kept.startswith(written) and written
        stop(other)
        assert answer.inner_text() == kept


def test_after_a_stop_the_next_question_keeps_its_stop_button_whatever_comes_late(
    browser: Browser, endless: str, tmp_path: Path
) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:  # what gradio sends at the end of what it cancels
        held.append(route)

    with visiting(browser, endless) as visitor:
        visitor.page.route("**/reset", hold)
        visitor.ask("Say hello.")
        first = is_being_answered(visitor)
        stop(visitor)
        visitor.ask("Again?")
        is_being_answered(visitor, 1)
        for late in held:
            late.continue_()
        for _ in range(5):
            second = is_being_answered(visitor, 1)
        stop(visitor)
        set_length(visitor, 20)
        visitor.ask("Once more?")
        expect(visitor.page.locator(BOT)).to_have_count(3)
        expect(visitor.page.locator(BOX)).to_be_enabled()  # it has come to its end
        expect(visitor.page.locator(STOP)).to_have_count(0)
        with visitor.page.expect_download() as download:
            visitor.page.get_by_role("button", name="Download").click()
        download.value.save_as(tmp_path / "said.json")
        said = [(message.role, message.text) for message in read_transcript(tmp_path / "said.json").messages]
        assert [text for role, text in said if role == "user"] == ["Say hello.", "Again?", "Once more?"]
        answers = [text for role, text in said if role == "assistant"]
        assert (len(answers), len(said)) == (3, 6)
        assert answers[0].startswith(first) and answers[1].startswith(second)
        assert [text.rstrip() for text in visitor.page.locator(BOT).all_inner_texts()] == [t.rstrip() for t in answers]


def test_a_stopped_answer_is_asked_for_again_and_its_question_edited(browser: Browser, endless: str) -> None:
    with visiting(browser, endless) as visitor:
        visitor.ask("Say hello.")
        is_being_answered(visitor)
        stop(visitor)
        visitor.page.get_by_role("button", name="Retry").click()
        is_being_answered(visitor)
        stop(visitor)
        visitor.page.get_by_role("button", name="Edit").click()
        visitor.page.locator(".edit-textarea").fill("Again?")
        visitor.page.locator("#chat-0").get_by_role("button", name="Submit").click()
        expect(visitor.page.locator("[data-testid=user]")).to_have_text(["Again?"])
        is_being_answered(visitor)
        stop(visitor)
        set_length(visitor, 1)
        visitor.page.get_by_role("button", name="Retry").click()
        expect(visitor.page.locator(BOX)).to_be_enabled()
        expect(visitor.page.locator(BOT)).to_have_count(1)


def test_a_new_chat_begins_once_the_answer_was_stopped(browser: Browser, endless: str) -> None:
    with visiting(browser, endless) as visitor:
        visitor.ask("Say hello.")
        is_being_answered(visitor)
        fresh = visitor.page.get_by_role("button", name="New chat")
        expect(fresh).to_be_disabled()
        expect(visitor.page.locator("#examples")).to_be_hidden()
        stop(visitor)
        visitor.start_anew()
        expect(visitor.page.locator("#examples")).to_be_visible()
        visitor.ask("Again?")
        is_being_answered(visitor)
        expect(visitor.page.locator("[data-testid=user]")).to_have_text(["Again?"])
        stop(visitor)


def test_a_closed_page_frees_the_model(browser: Browser, endless: str) -> None:
    for _ in range(2):
        with visiting(browser, endless) as visitor:
            visitor.ask("Say hello.")
            expect(visitor.page.locator(BOT)).not_to_be_empty()


def test_a_question_beyond_the_bound_of_the_queue_or_stopped_in_it_says_so(browser: Browser, endless: str) -> None:
    with (
        visiting(browser, endless) as first,
        visiting(browser, endless) as second,
        visiting(browser, endless) as third,
    ):
        first.ask("Say hello.")
        expect(first.page.locator(BOT)).not_to_be_empty()
        with second.page.expect_response("**/queue/join*"):
            second.ask("Say hello.")
        third.ask("Say hello.")
        stopped_or_full = "it did not begin: it was stopped, or 1 questions are waiting already; ask again in a while"
        line = f"⚠ not answered: {stopped_or_full}"
        third.expect_answers(line)
        expect(third.page.locator(".chat > .wrap .error")).to_be_hidden()  # gradio's word across the conversation
        second.page.locator(STOP).click()
        second.expect_answers(line)
        third.page.get_by_role("button", name="Retry").click()  # the place of the second is free
        expect(third.page.locator(BOT)).to_have_count(0)
        first.page.locator(STOP).click()
        expect(first.page.locator(BOX)).to_be_enabled()
        is_being_answered(third)
        stop(third)
        second.ask("Again?")
        is_being_answered(second, 1)

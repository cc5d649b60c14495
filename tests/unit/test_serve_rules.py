"""The rules of the server, without a network: who is let in, what is answered, what is remembered."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from chat_models import SHORT, counted, make_assistant, pictures_encoded
from serve_requests import LOOK_UP, QUESTION, data_url, said, shown

from mmft.chat.server.app import ServerOptions, build_app
from mmft.chat.server.desk import Desk, Job
from mmft.chat.server.errors import Refused
from mmft.chat.server.pictures import Pictures
from mmft.chat.server.request import Reader
from mmft.errors import ModelError
from mmft.inference import Assistant, Generation, user_message
from mmft.memory import Memory, Usage
from mmft.types import Conversation, Message, Text, ToolCall


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


def test_how_much_was_used_again_is_told_only_to_who_asked_it_before(
    seeing: Assistant, serving: Callable[..., Any]
) -> None:
    def asks(*messages: Any, **more: Any) -> int:
        (answer,) = post(client, {"messages": messages, "max_tokens": 4, **more})
        answers.append(answer.json()["choices"][0]["message"])
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    answers: list[Any] = []
    client, desk = serving(seeing)
    secret, guess = ({"role": "user", "content": f"My number is {number}"} for number in (1234, 1239))
    again = {"role": "user", "content": "And now?"}
    assert asks(secret) == asks(guess) == asks(secret) == asks(secret) == 0
    assert desk.memory.usage is not None and desk.memory.usage.reused_tokens > 10  # it was, and nobody is told
    assert asks(secret, answers[-1], again) > 10
    assert asks(secret, answers[-2], again) == 0
    assert asks(secret, answers[-3], again, answers[-1], again, tools=[LOOK_UP]) == 0


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


def test_whoever_still_waits_for_an_answer_that_was_given_up_is_told_so(seeing: Assistant, folder: Path) -> None:
    gone: list[Event | None] = []

    class Left(Scripted):
        """Its client is found to have left at the second piece, or was before the first."""

        def stream(self, *args: Any, cancel: Event | None = None, **more: Any) -> Iterator[str]:
            gone.append(cancel)
            yield "Hel"
            assert cancel is not None
            cancel.set()
            yield "lo"

    pictures = Pictures(folder)
    reader = Reader("m", seeing.template, True, Generation(), pictures)

    async def given_up() -> None:
        desk = Desk(Left(seeing.model, seeing.shape, seeing.template), pictures, max_waiting=1)
        for pieces, gone_before in ((1, False), (0, True)):
            job = Job(reader.read(json.dumps(QUESTION).encode()))
            if gone_before:
                job.gone.set()
            desk.put(job)
            for _ in range(pieces):
                await job.next()
            with pytest.raises(Refused, match="the client left") as left:
                await asyncio.wait_for(job.next(), timeout=300)
            assert left.value.status == 499
        desk.close()
        assert (desk.cancelled, desk.answered) == (2, 0)

    asyncio.run(given_up())
    assert len(gone) == 1


def test_an_answer_that_ended_by_itself_was_not_cancelled(seeing: Assistant) -> None:
    cancel = Event()
    conversation = Conversation((user_message("Hello"),))
    assert list(seeing.stream(conversation, SHORT, Memory(), cancel=cancel))
    assert not cancel.is_set()


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

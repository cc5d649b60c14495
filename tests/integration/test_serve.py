"""`mmft serve` in processes of their own, asked by the official client of OpenAI."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from serve_client import (
    ENDLESS,
    MAX_UPLOAD,
    PATIENCE,
    POSITIONS,
    QUESTION,
    SEEN,
    ask,
    bomb,
    connect,
    connect_async,
    data_url,
    health,
    served,
    show,
    wait_until,
    with_positions,
)

from mmft.chat.session import ChatSession
from mmft.inference import Assistant, find_model, load_assistant
from mmft.memory import Usage
from mmft.plugins import load_plugins


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Path:
    return with_positions(tiny_run)


@pytest.fixture(scope="module")
def address(run: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ("--max-upload", str(MAX_UPLOAD), "--name", "run", "--device", "cpu")
    folder = tmp_path_factory.mktemp("serve")
    with served(run, folder, environment, *options, end=signal.SIGINT, code=130) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return connect(address)


@pytest.fixture(scope="module")
def assistant(run: Path) -> Assistant:
    """The same model, asked directly."""
    return load_assistant(find_model(str(run)), load_plugins(), device=torch.device("cpu"))


@pytest.fixture
def picture(tiny_run: Path) -> Path:
    return tiny_run.parent / "red.png"


def numbers(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens


def expected(usage: Usage | None) -> tuple[int, int, int]:
    assert usage is not None
    return usage.prompt_tokens, usage.answer_tokens, usage.reused_tokens


def test_answer_and_numbers_are_those_of_a_chat_session_with_the_same_history(
    client: OpenAI, assistant: Assistant, picture: Path
) -> None:
    session = ChatSession(assistant)
    history: list[Any] = []
    for messages, text, images in (
        (show(data_url(picture.read_bytes())), QUESTION, [picture]),
        (ask("Say hello."), "Say hello.", []),
        (ask("Again?"), "Again?", []),
    ):
        history += messages
        said = client.chat.completions.create(model="run", messages=history)
        choice, answer = said.choices[0], "".join(session.ask(text, images))
        assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (answer, "stop", None)
        assert said.usage is not None
        if len(history) > 1:  # before the first the server was asked something else
            assert numbers(said.usage) == expected(session.usage)
            assert said.usage.prompt_tokens_details.cached_tokens > 20  # type: ignore[union-attr]
        assert said.usage.prompt_tokens == expected(session.usage)[0]
        history.append(choice.message.model_dump(exclude_none=True))


def test_a_system_text_is_told_by_both_its_names(client: OpenAI, assistant: Assistant) -> None:
    session = ChatSession(assistant, system="Be brief.")
    answer = "".join(session.ask("Say hello."))
    for role in ("system", "developer"):
        messages: list[Any] = [{"role": role, "content": "Be brief."}, *ask("Say hello.")]
        said = client.chat.completions.create(model="run", messages=messages)
        assert (said.choices[0].message.content, said.usage.prompt_tokens) == (answer, expected(session.usage)[0])  # type: ignore[union-attr]


def test_a_stream_is_the_same_answer_in_pieces_and_ends_with_its_numbers(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="run", messages=ask("Say hello."))
    stream = client.chat.completions.create(
        model="run", messages=ask("Say hello."), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len([piece for piece in pieces if piece]) > 3
    assert ("".join(pieces), chunks[-1].choices[0].finish_reason) == (whole.choices[0].message.content, "stop")
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)  # type: ignore[union-attr]
    assert {chunk.usage for chunk in chunks} == {None}


def test_an_uploaded_picture_is_asked_about_by_its_id_until_it_is_deleted(client: OpenAI, picture: Path) -> None:
    with picture.open("rb") as content:
        file = client.files.create(file=content, purpose="vision")
    assert (file.filename, file.bytes) == ("red.png", picture.stat().st_size)
    assert file.id in [other.id for other in client.files.list()]
    by_id: list[Any] = ask([{"type": "text", "text": QUESTION}, {"type": "file", "file": {"file_id": file.id}}])
    for messages in (show(file.id), by_id):
        assert client.chat.completions.create(model="run", messages=messages).choices[0].message.content == SEEN
    client.files.delete(file.id)
    with pytest.raises(NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(BadRequestError, match="nor the id of an uploaded file"):
        client.chat.completions.create(model="run", messages=show(file.id))


def test_the_model_is_listed_and_no_other_answers(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("run").id) == ("run", "run")
    with pytest.raises(NotFoundError, match="there is no model 'gpt' here, but 'run'"):
        client.models.retrieve("gpt")
    with pytest.raises(NotFoundError, match="there is no model 'gpt' here, but 'run'"):
        client.chat.completions.create(model="gpt", messages=ask("Hi"))


@pytest.mark.parametrize("stop", ["there", ["nowhere", "there"]])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: OpenAI, stop: Any) -> None:
    said = client.chat.completions.create(model="run", messages=ask("Say hello."), stop=stop)
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == ("Hello ", "stop")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_cut_off_says_so_and_counts_its_tokens(client: OpenAI, field: str) -> None:
    said = client.chat.completions.create(model="run", messages=ask("Count."), **{field: 4})  # type: ignore[call-overload]
    assert (said.choices[0].finish_reason, said.usage.completion_tokens) == ("length", 4)


def test_the_same_seed_gives_the_same_answer_and_greedy_is_the_default(client: OpenAI) -> None:
    def sampled(**options: Any) -> str | None:
        said = client.chat.completions.create(model="run", messages=ask("Count."), max_tokens=12, **options)
        return said.choices[0].message.content

    wild: dict[str, Any] = {"temperature": 9.0, "extra_body": {"top_k": 0}}
    assert sampled(seed=1, **wild) == sampled(seed=1, **wild)
    assert len({sampled(seed=seed, **wild) for seed in range(3)}) == 3
    assert sampled() == sampled(temperature=0) == "1 2 3 4 5 6 "[: len(sampled() or "")]


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"n": 2}, "n", "n is not supported here; allowed is 1"),
        ({"logprobs": True}, "logprobs", "logprobs is not supported here; allowed is false"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported here"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown field 'temprature'; did you mean 'temperature'"),
        ({"extra_body": {"seed": "one"}}, "seed", 'seed: .* integer, found "one"'),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0: allowed is a whole number from 1"),
        ({"top_p": 3.0}, "top_p", "top_p=3.0: allowed is above 0, at most 1"),
        ({"stop": ""}, "stop", "stop=.*strings that are not empty"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": ask(" ")}, "messages[0]", r"messages\[0\]: the question is empty"),
        ({"messages": [*ask("Hi"), {"role": "assistant", "content": "Ho"}]}, "messages", "nothing is asked"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0]", "role is 'robot'; allowed are system"),
        ({"messages": ask("Count. " * POSITIONS)}, "messages", "they take [0-9,]+ tokens .* the context has 120,000"),
        ({"messages": show("http://127.0.0.1:9/red.png")}, "messages[0].content[1]", "not fetched from the network"),
        ({"messages": show("/etc/hostname")}, "messages[0].content[1]", "neither a data: URL nor the id"),
        ({"messages": show("file:///etc/hostname")}, "messages[0].content[1]", "neither a data: URL nor the id"),
        ({"messages": show("data:image/png;base64,?")}, "messages[0].content[1]", "is no base64"),
        ({"messages": show(data_url(b"text"))}, "messages[0].content[1]", r"content\[1\]: not an image; allowed are"),
        ({"messages": show(data_url(bomb()))}, "messages[0].content[1]", r"content\[1\]: .*at most 89,478,485"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_its_name(
    client: OpenAI, options: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(BadRequestError, match=message) as refused:
        client.chat.completions.create(**{"model": "run", "messages": ask("Hi"), **options})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_what_does_not_change_the_answer_is_ignored(client: OpenAI) -> None:
    said = client.chat.completions.create(
        model="run", messages=ask("Say hello."), user="me", metadata={"a": "b"}, n=1, presence_penalty=0,
        response_format={"type": "text"},
    )  # fmt: skip
    assert said.choices[0].message.content == "Hello there."


def test_html_is_text(client: OpenAI, answers: dict[str, str]) -> None:
    said = client.chat.completions.create(model="run", messages=ask("Write HTML."))
    assert said.choices[0].message.content == answers["Write HTML."]


@pytest.mark.parametrize("content", [b"no picture", bomb()])
def test_an_upload_that_is_no_picture_is_refused(client: OpenAI, content: bytes) -> None:
    with pytest.raises(BadRequestError, match=r"a\.png: "):
        client.files.create(file=("a.png", content), purpose="vision")
    assert client.files.list().data == []


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("path", ["/chat/completions", "/files"])
def test_a_body_of_100_mb_is_refused_while_it_comes(address: str, path: str, declared: bool) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(1000):
            sent += 100_000
            yield bytes(100_000)

    headers = {"Content-Type": "multipart/form-data; boundary=b"} | (
        {"Content-Length": "100000072"} if declared else {}
    )
    answer = httpx.post(address + path, content=body(), headers=headers, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert sent < 50_000_000


def test_nonsense_is_refused_in_the_same_form(address: str) -> None:
    for method, path, body, status in (
        ("POST", "/chat/completions", b"{", 400), ("POST", "/chat/completions", b"[]", 400),
        ("POST", "/chat/completions", b"[" * 100_000, 400), ("GET", "/chat/completions", b"", 405),
        ("GET", "/nowhere", b"", 404), ("POST", "/files", b"", 400),
    ):  # fmt: skip
        answer = httpx.request(method, address + path, content=body, timeout=PATIENCE)
        assert (answer.status_code, sorted(answer.json()["error"])) == (status, ["code", "message", "param", "type"])


@pytest.mark.parametrize("stream", [True, False])
def test_the_model_stops_when_the_client_leaves(address: str, client: OpenAI, stream: bool) -> None:
    before = health(address)
    assert before["in_progress"] == 0

    async def leave_in_the_middle() -> None:
        async with connect_async(address) as leaving:
            asked = leaving.chat.completions.create(model="run", messages=ask("Count."), stream=stream, **ENDLESS)
            if stream:
                await anext(aiter(await asked))
                return
            waiting = asyncio.ensure_future(asked)
            while (await asyncio.to_thread(health, address))["in_progress"] == 0:
                assert not waiting.done()
            waiting.cancel()

    asyncio.run(leave_in_the_middle())
    wait_until(lambda: health(address) == {**before, "cancelled": before["cancelled"] + 1})
    said = client.chat.completions.create(model="run", messages=ask("Say hello."))
    assert said.choices[0].message.content == "Hello there."


def test_32_clients_at_once_get_each_its_own_answer(address: str, answers: dict[str, str], picture: Path) -> None:
    short = [
        (ask(question), answer) for question, answer in answers.items() if len(answer) < 20 and answer.isprintable()
    ]
    kinds = [*short, (show(data_url(picture.read_bytes())), SEEN)]
    cases = [kinds[number % len(kinds)] for number in range(32)]

    async def one(client: AsyncOpenAI, messages: list[Any], stream: bool) -> str:
        if not stream:
            said = await client.chat.completions.create(model="run", messages=messages)
            return said.choices[0].message.content or ""
        chunks = await client.chat.completions.create(model="run", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def everybody() -> list[str]:
        async with connect_async(address) as client:
            asked = (one(client, messages, number % 2 == 0) for number, (messages, _) in enumerate(cases))
            return await asyncio.gather(*asked)

    assert asyncio.run(everybody()) == [answer for _, answer in cases]


def test_a_text_model_with_a_key_and_no_queue_refuses_pictures_strangers_and_whoever_would_wait(
    tiny_text_run: Path, environment: dict[str, str], tmp_path: Path, picture: Path
) -> None:
    surroundings = {**environment, "MMFT_API_KEY": "secret"}
    options = ("--max-waiting", "0", "--name", "mine/text", "--device", "cpu")
    with served(with_positions(tiny_text_run), tmp_path, surroundings, *options, end=signal.SIGTERM, code=0) as address:
        client = connect(address, "secret")
        assert client.models.retrieve("mine/text").id == "mine/text"
        with pytest.raises(APIStatusError, match="API key is missing or wrong") as refused:
            connect(address, "guess").models.list()
        assert (refused.value.status_code, health(address)["status"]) == (401, "ok")
        with pytest.raises(BadRequestError, match="this is a text model, it takes no pictures"):
            client.chat.completions.create(model="mine/text", messages=show(data_url(picture.read_bytes())))
        with pytest.raises(BadRequestError, match="this is a text model, it takes no pictures"):
            client.files.create(file=picture, purpose="vision")
        with client.chat.completions.create(model="mine/text", messages=ask("Count."), stream=True, **ENDLESS) as first:
            next(iter(first))
            with pytest.raises(APIStatusError, match="0 questions are waiting already") as full:
                client.chat.completions.create(model="mine/text", messages=ask("Hi"))
            assert (full.value.status_code, full.value.response.headers["retry-after"]) == (503, "1")
        wait_until(lambda: health(address)["cancelled"] == 1)
        said = client.chat.completions.create(model="mine/text", messages=ask("Say hello."))
        assert said.choices[0].message.content == "Hello there."

"""What the server reads of a request: what is asked, what is refused, which pictures are kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_models import make_assistant
from serve_requests import LOOK_UP, QUESTION, data_url, said, shown

from mmft.chat.server.errors import Refused
from mmft.chat.server.pictures import Pictures
from mmft.chat.server.request import Reader
from mmft.inference import Assistant, Generation, user_message
from mmft.plugins import load_plugins
from mmft.types import Conversation, Image, Message, Text, ToolCall


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return make_assistant(tmp_path_factory.mktemp("seeing"), sees=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


@pytest.fixture
def read(seeing: Assistant, folder: Path) -> Callable[..., Conversation]:
    """`read(*messages)`: the conversation of a request."""
    reader = Reader("m", seeing.template, True, Generation(), Pictures(folder))
    return lambda *messages, **more: reader.read(json.dumps({"messages": messages, **more}).encode()).conversation


def called(arguments: Any) -> dict[str, Any]:
    """A message of the assistant that makes a call."""
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


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
        ([called("{")], {}, "as JSON in a st"),
        (["Hi"], {}, r"messages\[0\]: role is None"),
        ([{"role": "user", "content": "Hi"}], {"tools": [{"name": "f"}]}, r"tools\[0\]: allowed is"),
        ([{"role": "user", "content": "Hi"}], {"tool_choice": "required"}, 'tool_choice .* "auto" or "none"'),
        ([{"role": "user", "content": "Hi"}], {"max_tokens": 1, "max_completion_tokens": 2}, "differ; give one"),
        ([{"role": "user", "content": "Hi"}], {"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ([{"role": "assistant", "tool_calls": 5}], {}, r"^messages\[0\].tool_calls: a list is needed"),
        ([called("[" * 100_000)], {}, r"^messages\[0\].tool_calls\[0\]: allowed is"),
        ([called('{"word": "\\ud800"}')], {}, r"^messages\[0\].tool_calls\[0\]: allowed is"),
        ([called(5)], {}, r"^messages\[0\].tool_calls\[0\]: allowed is"),
        ([{"role": "user", "content": "Hi"}], {"stop": ["x"] * 17}, "^stop: at most 16 strings of 1,000 characters"),
        ([{"role": "user", "content": "Hi"}], {"stop": "x" * 1001}, "^stop: at most 16 strings of 1,000 characters"),
        ([{"role": "user", "content": "Hi"}], {"temperature": 1e-45}, "^temperature=1e-45: allowed is 0"),
    ],
)
def test_what_a_request_may_not_say(
    read: Callable[..., Conversation], messages: list[Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message) as refused:
        read(*messages, **more)
    assert (refused.value.status, bool(refused.value.param)) == (400, True)


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


def test_tools_are_refused_where_the_template_has_no_form_for_them(seeing: Assistant, folder: Path) -> None:
    template = load_plugins().chat_templates.get("vicuna")
    reader = Reader("m", template, True, Generation(), Pictures(folder))
    with pytest.raises(Refused, match="chat template, 'vicuna', has no form for tools"):
        reader.read(json.dumps({**QUESTION, "tools": [LOOK_UP]}).encode())

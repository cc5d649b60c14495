"""MOSS and MSAgent-Bench: what the assistant writes is trained, what a tool answers never is, nothing is run."""

import json
from typing import Any

import pytest

from mmft.errors import DataError
from mmft.types import Conversation, Message, RawRecord, Text, ToolCall
from mmft_plugins._moss import MOSS, moss_sft
from mmft_plugins._msagent import msagent_react
from mmft_plugins.text_sft import openai

CALL = '<|startofthink|>```JSON\n{"api_name": "f", "parameters": {"a": 1}}\n```<|endofthink|>'
RESULT = '<|startofexec|>```JSON\n{"b": 2}\n```<|endofexec|>'


def ms(*turns: tuple[str, str]) -> RawRecord:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def moss(**turn: str) -> dict[str, Any]:
    keys = {"Human": "<|Human|>: q<eoh>\n", "MOSS": "<|MOSS|>: a<eom>\n"}
    return {"meta_instruction": "M", "num_turns": "1", "chat": {"turn_1": {**keys, **turn}}}


def test_moss_trains_all_the_assistant_writes_and_no_tool_response() -> None:
    sample = moss_sft(MOSS.examples[1])
    assert sample is not None
    assert "".join(one.text for one in sample.messages if one.is_trained) == (
        "<|Inner Thoughts|>: This needs a calculation.<eot>\n"
        '<|Commands|>: Calculate("12 * 12")<eoc>\n'
        "<|MOSS|>: It is 144.<eom>\n"
    )
    (tool,) = (one for one in sample.messages if one.role == "tool")
    assert not tool.is_trained and "144" in tool.text


def test_moss_strips_the_marks_of_the_question_which_the_template_writes() -> None:
    sample = moss_sft(moss())
    assert sample is not None and [(one.role, one.text) for one in sample.messages] == [
        ("system", "M"), ("user", "q"), ("assistant", "<|MOSS|>: a<eom>\n"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"chat": "x"}, "'chat' must be an object of turns, found 'x'"),
        ({**moss(), "num_turns": 2}, "chat.turn_2 must be an object, found None"),
        ({**moss(), "num_turns": "x"}, "'num_turns' must be a number"),
        ({"chat": {"turn_1": {"Human": "a"}}}, "chat.turn_1: 'MOSS' is missing; keys found: 'Human'"),
    ],
)
def test_moss_says_what_is_wrong_with_a_record(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        moss_sft(record)


def test_msagent_turns_marks_into_calls_and_results() -> None:
    assert msagent_react(ms(("user", "q"), ("assistant", f"I look.\n{CALL}\n\n{RESULT}\nDone."))) == Conversation(
        (
            Message("user", (Text("q"),)),
            Message("assistant", (Text("I look."),), (ToolCall("f", {"a": 1}),)),
            Message("tool", (Text('{"b": 2}'),)),
            Message("assistant", (Text("Done."),)),
        )
    )


def test_msagent_reads_calls_in_a_row_as_parallel_and_one_without_a_result() -> None:
    sample = msagent_react(ms(("user", "q"), ("assistant", f"{CALL}{CALL}{RESULT}{RESULT}{CALL}")))
    assert sample is not None
    assert [(one.role, len(one.tool_calls)) for one in sample.messages] == [
        ("user", 0), ("assistant", 2), ("tool", 0), ("tool", 0), ("assistant", 1),
    ]  # fmt: skip


def test_msagent_makes_tools_of_the_apis_in_the_system_text() -> None:
    api = {"name": "f", "description": "d", "paths": [{"parameters": [{"name": "a", "required": "False"}]}]}
    sample = msagent_react(ms(("system", f"1. {json.dumps(api)}"), ("user", "q"), ("assistant", "r")))
    assert sample is not None and sample.messages[0].role == "user"
    assert sample.tools[0]["function"] == {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": ""}}, "required": []},
    }


def test_msagent_keeps_a_system_text_without_apis() -> None:
    sample = msagent_react(ms(("system", "Be {brief}."), ("user", "q"), ("assistant", "r")))
    assert sample is not None and sample.messages[0] == Message("system", (Text("Be {brief}."),)) and not sample.tools


@pytest.mark.parametrize("spelling", [repr, json.dumps])
def test_msagent_reads_a_string_of_json_or_python(spelling: Any) -> None:
    record = ms(("user", "it's"), ("assistant", 'a "b"'))
    assert msagent_react({"conversations": spelling(record["conversations"])}) == msagent_react(record)


def test_nothing_in_a_record_is_run(tmp_path: Any) -> None:
    touched = tmp_path / "touched"
    with pytest.raises(DataError, match="neither JSON nor a Python literal"):
        msagent_react({"conversations": f"[open({str(touched)!r}, 'w')]"})
    assert not touched.exists()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("<|startofthink|>{<|endofthink|>", r"conversations\[1\]: the call between the think marks is not JSON"),
        ("<|startofthink|>[1]<|endofthink|>", r"a call must be an object, found \[1\]"),
        ("<|startofthink|>{}<|endofthink|>", "a call needs 'api_name'; keys found: none"),
    ],
)
def test_msagent_says_what_is_wrong_with_a_record(answer: str, error: str) -> None:
    with pytest.raises(DataError, match=error):
        msagent_react(ms(("user", "q"), ("assistant", answer)))


# openai: images of the record


def shown(content: Any, **fields: Any) -> RawRecord:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "r"}], **fields}


def test_a_part_without_a_path_takes_the_next_image_of_the_record() -> None:
    content = [{"type": "image"}, {"type": "image", "image": "own.png"}, "and", {"type": "image"}]
    sample = openai(shown(content, images=["1.png", {"path": "2.png", "bytes": None}]))
    assert sample is not None and [str(one.source) for one in sample.images] == ["1.png", "own.png", "2.png"]


def test_marks_in_a_text_show_the_images_of_the_record() -> None:
    sample = openai(shown("a <image> b", image="1.png"))
    assert sample is not None and sample.images and sample.messages[0].text == "a  b"


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (shown([{"type": "image"}]), "the record's 'images' has no other left"),
        (shown([{"type": "image"}], images=["1", "2"]), "2 images, but 1 parts of type 'image'"),
        (shown("<image><image>", images=["1"]), "2 <image> marks, 1 image"),
        (shown([{"type": "audio"}]), "a part of type 'audio'"),
        (shown([3]), "a part of 'content' must be an object or a string, found int"),
    ],
)
def test_images_and_their_places_must_be_equally_many(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        openai(record)

"""OpenAI messages: calls with their ids, tools, thoughts; and what every data map leaves out, with a note."""

from typing import Any

import pytest

from mmft.errors import DataError
from mmft.types import Conversation, Message, RawRecord, ToolCall
from mmft_plugins._llava_maps import llava
from mmft_plugins._openai import write
from mmft_plugins._sharegpt import sharegpt
from mmft_plugins.text_sft import openai


def said(conversation: Conversation | None) -> list[tuple[str, str]]:
    assert conversation is not None
    return [(message.role, message.text) for message in conversation.messages]


def talk(*turns: Any) -> dict[str, Any]:
    """OpenAI messages: pairs of role and content, or whole objects."""
    return {"messages": [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in turns]}


def shown(*turns: tuple[str, str]) -> dict[str, Any]:
    """A LLaVA or ShareGPT record."""
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


THOUGHT_PARTS = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    "answer",
    [
        {"reasoning_content": "hm", "content": "a"},
        {"thinking": "hm", "content": "a"},
        {"reasoning": "hm", "content": "a"},
        {"content": THOUGHT_PARTS},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "a"]},
    ],
)
def test_what_an_assistant_thought_is_kept_apart_from_its_answer_noted_and_written_back(answer: RawRecord) -> None:
    sample = openai(talk(("user", "q"), {"role": "assistant", **answer}))
    assert sample is not None
    assert (sample.messages[1].reasoning, sample.messages[1].text) == ("hm", "a")
    assert sample.notes == ()  # whether it is trained is the chat template's affair
    assert openai(write(sample)) == sample


def test_empty_thoughts_are_none_and_a_users_are_an_error() -> None:
    answer = {"role": "assistant", "reasoning_content": " \n", "content": "a"}
    sample = openai(talk(("user", "q"), answer))
    assert sample is not None and sample.messages[1].reasoning is None and not sample.notes
    with pytest.raises(DataError, match="a part of type 'thinking'"):
        openai(talk(("user", THOUGHT_PARTS), ("assistant", "a")))
    with pytest.raises(DataError, match="'reasoning_content' must be a string, found int"):
        openai(talk(("user", "q"), {**answer, "reasoning_content": 3}))


# what every map leaves out: `_turns.conversation`


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_answer_among_others_is_not_trained_and_noted(empty: str | None) -> None:
    sample = openai(talk(("user", "a"), ("assistant", empty), ("user", "c"), ("assistant", "d")))
    assert sample is not None and [one.is_trained for one in sample.messages] == [False, False, False, True]
    assert sample.notes == ("empty answers are not trained: 1",)


@pytest.mark.parametrize(
    "after",
    [
        [("user", "c")],
        [("user", "c"), ("assistant", "")],
        [("user", "c"), {"role": "assistant", "content": "d", "loss": False}],
        [("tool", "out")],
    ],
)
def test_turns_after_the_last_trained_answer_are_left_out_and_noted(after: list[Any]) -> None:
    turns = [("user", "a"), ("assistant", "b")]
    sample = openai(talk(*turns, *after))
    assert said(sample) == turns and sample is not None
    assert sample.notes == (f"turns after the last trained answer are left out: {len(after)}",)


def test_every_map_leaves_a_trailing_question_out() -> None:
    turns = [("human", "a"), ("gpt", "b"), ("human", "c")]
    for sample in (llava(shown(*turns)), sharegpt(shown(*turns))):
        assert said(sample) == [("user", "a"), ("assistant", "b")]


# agent

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
SCHEMA = {"name": "f", "parameters": {"type": "object"}}


def calling(*calls: Any, content: str | None = None) -> dict[str, Any]:
    return talk(("user", "q"), {"role": "assistant", "content": content, "tool_calls": list(calls)}, ("tool", "out"))


def test_agent_reads_calls_with_arguments_as_string_or_object_and_several_at_once() -> None:
    bare = {"name": "g", "arguments": {"b": 2}}
    sample = openai({**calling(CALL, bare, {"function": {"name": "h", "arguments": ""}}), "tools": [SCHEMA]})
    assert sample is not None
    assert sample.messages[1].tool_calls == (
        ToolCall("f", {"a": [1, "x"]}, "1"), ToolCall("g", {"b": 2}), ToolCall("h", {}),
    )  # fmt: skip


def test_agent_keeps_text_beside_calls() -> None:
    sample = openai(calling(CALL, content="I look."))
    assert sample is not None
    assert sample.messages[1].text == "I look." and len(sample.messages[1].tool_calls) == 1


@pytest.mark.parametrize("tools", [[SCHEMA], [{"type": "function", "function": SCHEMA}], None])
def test_agent_reads_tools_wrapped_or_bare(tools: Any) -> None:
    sample = openai({**calling(CALL), "tools": tools})
    assert sample is not None
    assert sample.tools == (({"type": "function", "function": SCHEMA},) if tools else ())


def test_agent_reads_tools_written_as_a_json_string() -> None:
    sample = openai({**calling(CALL), "tools": '[{"name": "f"}]'})
    assert sample is not None and sample.tools == ({"type": "function", "function": {"name": "f"}},)


def test_the_form_of_calls_before_2023_11_is_read_too() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    sample = openai(talk(("user", "q"), call, ("function", "out"), ("assistant", "r")))
    assert sample is not None
    assert sample.messages[1].tool_calls == (ToolCall("f", {}),) and sample.messages[2].role == "tool"


def test_a_call_alone_is_an_answer_and_tool_output_is_never_a_target() -> None:
    sample = openai(talk(*calling(CALL)["messages"], ("assistant", "r")))
    assert sample is not None
    assert [message.is_trained for message in sample.messages] == [False, True, False, True]


def test_the_ids_of_calls_and_results_are_kept_and_written_back() -> None:
    told = {"role": "tool", "tool_call_id": "1", "content": "out"}
    record = talk(("user", "q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, told, ("assistant", "r"))
    sample = openai(record)
    assert sample is not None
    assert sample.messages[1].tool_calls[0].id == "1" and sample.messages[2].call_id == "1"
    written = write(sample)["messages"]
    assert written[1]["tool_calls"][0]["id"] == "1" and written[2]["tool_call_id"] == "1"
    assert openai({"messages": written}) == sample


def test_an_id_may_be_missing_or_a_number_and_nothing_else() -> None:
    sample = openai(calling({**CALL, "id": 7}, {**CALL, "id": None}, {**CALL, "id": ""}))
    assert sample is not None and [call.id for call in sample.messages[1].tool_calls] == ["7", None, None]
    assert (
        "id"
        not in write(Conversation((Message("assistant", (), (ToolCall("f", {}),)),)))["messages"][0]["tool_calls"][0]
    )
    with pytest.raises(DataError, match=r"messages\[1\]: 'id' must be a string, found list"):
        openai(calling({**CALL, "id": [1]}))


def test_functions_are_the_name_of_tools_before_2023_11() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    sample = openai({**talk(("user", "q"), call), "functions": [SCHEMA]})
    assert sample is not None and sample.tools == ({"type": "function", "function": SCHEMA},)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (calling({"function": {"name": "f", "arguments": "{"}}), r"messages\[1\]: the arguments .* are not JSON"),
        (calling({"function": {"name": "f", "arguments": "[1]"}}), r"must be an object, found \[1\]"),
        (calling({"function": {"arguments": "{}"}}), "'name' is missing; keys found: 'arguments'"),
        (calling({"function": "f"}), "a tool call's 'function' must be an object, found 'f'"),
        (talk({"role": "user", "content": "", "tool_calls": [CALL]}), "role 'user'; only an assistant calls tools"),
        (talk({"role": "tool", "content": "", "loss": True}), "tool output is never a target"),
        ({**calling(CALL), "tools": [{"x": 1}]}, "a tool needs 'function' or 'name'; keys found: 'x'"),
        ({**calling(CALL), "tools": "{"}, "'tools' is a string but not JSON"),
    ],
)
def test_agent_says_what_is_wrong_with_a_record(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        openai(record)

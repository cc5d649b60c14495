"""XTuner's formats by their names, ShareGPT, LLaVA's variants, and the system texts."""

from typing import Any

import pytest

from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.types import Conversation, Document, Image, Message, RawRecord, Text, ToolCall
from mmft_plugins._llava_maps import llava, llava_image_only
from mmft_plugins._sharegpt import sharegpt, wizardlm
from mmft_plugins.system_texts import TEXTS
from mmft_plugins.text_sft import openai, prompt_completion, query_response
from mmft_plugins.xtuner_maps import colors, medical, oasst1, write_xtuner, xtuner

KEYS = """alpaca alpaca_zh arxiv code_alpaca colors crime_kg default law_reference llava llava_image_only medical
msagent_react oasst1 openai openorca pretrain sql stack_exchange tiny_codes wizardlm moss_sft"""
XTUNER = KEYS.split()


def said(sample: object) -> list[tuple[str, str]]:
    assert isinstance(sample, Conversation)
    return [(message.role, message.text) for message in sample.messages]


def spoken(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def test_every_key_of_xtuner_is_there(plugins: Plugins) -> None:
    assert len(XTUNER) == 21 and set(XTUNER) <= set(plugins.data_maps.names())


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, [("user", "i\nx"), ("assistant", "o")]),
        ("alpaca_zh", {"instruction_zh": "i", "input_zh": None, "output_zh": "o"}, [("user", "i"), ("assistant", "o")]),
        ("arxiv", {"abstract": "a", "title": "t"}, ["arxiv_gentile", ("user", "a"), ("assistant", "t")]),
        ("code_alpaca", {"prompt": "p", "completion": "c"}, ["coder", ("user", "p"), ("assistant", "c")]),
        ("colors", {"description": "N: d: e", "color": "#1"}, ["colorist", ("user", "d: e"), ("assistant", "#1")]),
        ("crime_kg", {"input": "i", "output": "o"}, ["lawyer", ("user", "i"), ("assistant", "o")]),
        ("default", {"input": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ("law_reference", {"question": "q", "answer": "a"}, ["lawyer", ("user", "q"), ("assistant", "a")]),
        ("medical", {"instruction": "i", "input": "", "output": "o"}, ["medical", ("user", "i"), ("assistant", "o")]),
        (
            "oasst1",
            {"text": "### Human: a### Assistant: b### Human: c### Assistant: d"},
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (
            "openorca",
            {"system_prompt": "s", "question": "q", "response": "r"},
            [("system", "s"), ("user", "q"), ("assistant", "r")],
        ),
        ("openorca", {"system_prompt": "", "question": "q", "response": "r"}, [("user", "q"), ("assistant", "r")]),
        ("sql", {"context": "c", "question": "q", "answer": "a"}, ["sql", ("user", "c\nq"), ("assistant", "a")]),
        ("stack_exchange", {"question": "q", "response": "r"}, [("user", "q"), ("assistant", "r")]),
        ("tiny_codes", {"prompt": "p", "response": "r"}, ["coder", ("user", "p"), ("assistant", "r")]),
        ("wizardlm", spoken(("human", "a"), ("gpt", "b")), [("user", "a"), ("assistant", "b")]),
    ],
)
def test_each_format_of_columns_becomes_its_turns(
    name: str, record: RawRecord, expected: list[Any], plugins: Plugins
) -> None:
    turns = [("system", TEXTS[turn]) if isinstance(turn, str) else turn for turn in expected]
    assert said(plugins.data_maps.get(name).fn(record)) == turns


@pytest.mark.parametrize("name", XTUNER)
def test_a_record_without_its_columns_is_an_error_that_names_one(name: str, plugins: Plugins) -> None:
    with pytest.raises(DataError, match=r"is missing; keys found: 'x'|must be an object .*keys found: 'x'"):
        plugins.data_maps.get(name).fn({"x": 1})


def test_the_eight_system_texts_are_offered_with_their_source(plugins: Plugins) -> None:
    assert plugins.system_texts.names() == sorted(TEXTS) and len(TEXTS) == 8
    assert all(one.text.strip() and "own words" in one.source for one in plugins.system_texts)


def test_a_record_with_a_system_text_keeps_it() -> None:
    assert said(medical({"instruction": "i", "output": "o", "system": "S"}))[0] == ("system", "S")


def test_a_colour_without_a_name_keeps_its_whole_description() -> None:
    assert said(colors({"description": "of grass", "color": "#0f0"}))[1] == ("user", "of grass")


def test_oasst1_leaves_headings_alone_and_counts_a_question_without_an_answer() -> None:
    sample = oasst1({"text": "### Human: a\n### Assistant: ### Heading\n#### b### Human: c"})
    assert said(sample) == [("user", "a"), ("assistant", "### Heading\n#### b")]
    assert sample is not None and sample.notes == ("the last question has no answer",)
    with pytest.raises(DataError, match="must begin with '### Human:'"):
        oasst1({"text": "plain"})


# xtuner


def test_xtuners_own_form_keeps_its_turns_and_their_loss() -> None:
    turns = [
        {"system": "S", "input": "a", "output": "b", "output_with_loss": False, "need_eos_token": True},
        {"input": "c", "output": "d"},
    ]
    sample = xtuner({"conversation": turns})
    assert said(sample) == [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert isinstance(sample, Conversation)
    assert [message.is_trained for message in sample.messages] == [False, False, False, False, True]


def test_a_turn_without_a_question_is_a_document_of_which_all_is_trained() -> None:
    assert xtuner({"conversation": [{"input": "", "output": "Bread."}]}) == Document("Bread.")
    assert xtuner({"conversation": [{"output": "Bread."}]}) == Document("Bread.")
    assert xtuner({"conversation": [{"input": " ", "output": " "}]}) is None
    assert said(xtuner({"conversation": [{"system": "S", "input": "", "output": "b"}]}))[0] == ("system", "S")


def test_xtuners_own_form_is_written_as_it_was_read(plugins: Plugins) -> None:
    for record in plugins.data_maps.get("xtuner").examples:
        sample = xtuner(record)
        assert sample is not None and write_xtuner(sample) == record


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("a", "'conversation' must be a list of objects, found str: 'a'"),
        ([{"input": "a"}], r"conversation\[0\]: 'output' is missing; keys found: 'input'"),
        ([{"input": "a", "output": "b"}, {"input": 1, "output": "b"}], r"conversation\[1\]: 'input' must be a string"),
        ([{"input": "a", "output": "b", "output_with_loss": "no"}], "must be true or false, found 'no'"),
    ],
)
def test_what_is_wrong_in_xtuners_own_form_is_named_with_its_turn(turns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        xtuner({"conversation": turns})


# sharegpt


def test_sharegpt_reads_calls_and_observations_and_tool_output_is_never_a_target() -> None:
    record = spoken(
        ("human", "q"), ("gpt", "I look."), ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
        ("function_call", '{"name": "g", "arguments": "{}"}'), ("observation", "1"), ("tool", "2"), ("gpt", "r"),
        system="S", tools='[{"name": "f"}]',
    )  # fmt: skip
    sample = sharegpt(record)
    assert sample == Conversation(
        (
            Message("system", (Text("S"),)),
            Message("user", (Text("q"),)),
            Message("assistant", (Text("I look."),), (ToolCall("f", {"a": 1}), ToolCall("g", {}))),
            Message("tool", (Text("1"),)),
            Message("tool", (Text("2"),)),
            Message("assistant", (Text("r"),)),
        ),
        ({"type": "function", "function": {"name": "f"}},),
    )
    assert [message.is_trained for message in sample.messages] == [False, False, True, False, False, True]


def test_sharegpt_shows_each_image_at_its_mark() -> None:
    sample = sharegpt(spoken(("user", "a <image> b <image>"), ("assistant", "c"), images=["1", "2"]))
    assert sample is not None
    assert sample.messages[0].parts == (Text("a "), Image("1"), Text(" b "), Image("2"))


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (spoken(("human", "<image>"), ("gpt", "x"), image="1"), "use the data map 'llava'"),
        (spoken(("human", "<image><image><image>"), ("gpt", "x"), images=["1"]), "3 <image> marks, 1 image"),
        (spoken(("human", "x"), ("function_call", "{")), r"conversations\[1\]: a tool call is not JSON"),
        (spoken(("bot", "x")), r"conversations\[0\]: from 'bot'; allowed: 'human', 'user', 'gpt'"),
    ],
)
def test_sharegpt_says_what_is_wrong_with_a_record(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        sharegpt(record)


def test_wizardlm_takes_an_image_mark_for_text() -> None:
    assert said(wizardlm(spoken(("human", "<image>"), ("gpt", "x"))))[0] == ("user", "<image>")


# XTuner's defects stay behind


@pytest.mark.parametrize("read", [llava, sharegpt, wizardlm])
def test_answers_before_the_first_question_are_dropped_with_a_count(read: Any) -> None:
    sample = read(spoken(("system", "S"), ("gpt", "x"), ("gpt", "y"), ("human", "a"), ("gpt", "b")))
    assert said(sample) == [("system", "S"), ("user", "a"), ("assistant", "b")]
    assert sample.notes == ("2 answers before the first question",)


def test_questions_that_follow_one_another_stay_separate() -> None:
    turns = [("user", "a"), ("user", "b"), ("assistant", "c")]
    assert said(llava(spoken(("human", "a"), ("human", "b"), ("gpt", "c")))) == turns
    assert said(openai({"messages": [{"role": role, "content": text} for role, text in turns]})) == turns


@pytest.mark.parametrize("identity", [{}, {"id": 1}, {"id": "1"}, {"id": None}])
def test_llava_needs_no_id_and_takes_any(identity: dict[str, Any]) -> None:
    sample = llava({**spoken(("human", "<image>a"), ("gpt", "b")), "image": "1.jpg", **identity})
    assert sample is not None and sample.images == (Image("1.jpg"),)


def test_llava_image_only_keeps_the_images_of_a_question_alone() -> None:
    sample = llava_image_only(spoken(("human", "a <image> b <image>"), ("gpt", "c"), image=["1", "2"]))
    assert sample is not None and sample.messages[0].parts == (Image("1"), Image("2"))
    with pytest.raises(DataError, match=r"message 1 \(user\) shows no image"):
        llava_image_only(spoken(("human", "a"), ("gpt", "b")))


# query_response, prompt_completion


def test_query_response_reads_system_history_and_images() -> None:
    sample = query_response(
        {"query": "<image>c", "response": "d", "system": "S", "history": [["a", "b"]], "images": ["1.jpg"]}
    )
    assert said(sample) == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
    ]  # fmt: skip
    assert sample is not None and sample.messages[3].parts[0] == Image("1.jpg")


def test_only_the_completion_is_trained() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    sample = prompt_completion({"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]})
    assert sample is not None and [one.is_trained for one in sample.messages] == [False, False, False, True]
    assert said(prompt_completion({"prompt": "a", "completion": "b"})) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"prompt": "a"}, "'completion' is missing"),
        ({"prompt": "a", "completion": []}, "must both be strings or both be lists"),
        ({"prompt": [{"role": "x"}], "completion": []}, r"prompt\[0\]: role 'x'"),
    ],
)
def test_prompt_completion_says_what_is_wrong_with_a_record(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        prompt_completion(record)


# the way back


def test_what_a_format_writes_it_reads_as_the_same_sample(plugins: Plugins) -> None:
    written = [data_map for data_map in plugins.data_maps if data_map.write]
    assert {one.name for one in written} >= {"alpaca", "messages", "llava", "sharegpt", "query_response", "pretrain"}
    for data_map in written:
        for example in data_map.examples:
            sample = data_map.fn(example)
            assert sample is not None and data_map.write is not None
            assert data_map.fn(data_map.write(sample)) == sample


@pytest.mark.parametrize(
    ("name", "messages", "error"),
    [
        ("alpaca", [("user", "a"), ("user", "b"), ("assistant", "c")], "question and answer in turn"),
        ("alpaca", [{"role": "user", "content": [{"type": "image", "image": "1"}]}, ("assistant", "c")], "an image"),
        ("llava", [("user", "a"), {"role": "assistant", "content": "b", "loss": False}, ("assistant", "c")], "'loss'"),
        ("query_response", [("user", "a"), ("tool", "b"), ("assistant", "c")], "no place for tools"),
        ("pretrain", [("user", "a"), ("assistant", "c")], "no place for a conversation"),
    ],
)
def test_a_format_refuses_to_write_what_it_has_no_place_for(
    name: str, messages: list[Any], error: str, plugins: Plugins
) -> None:
    turns = [one if isinstance(one, dict) else {"role": one[0], "content": one[1]} for one in messages]
    sample, write = openai({"messages": turns}), plugins.data_maps.get(name).write
    assert sample is not None and write is not None
    with pytest.raises(DataError, match=error):
        write(sample)

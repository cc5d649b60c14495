"""The data maps: alpaca, openai (also messages and agent), pretrain, llava and caption."""

from collections.abc import Mapping
from typing import Any

import pytest

from mmft.errors import DataError
from mmft.types import Conversation, Document, Image, Message, RawRecord, Text
from mmft_plugins._llava_maps import caption, llava
from mmft_plugins.pretrain import pretrain
from mmft_plugins.text_sft import alpaca, openai


def said(conversation: Conversation | None) -> list[tuple[str, str]]:
    assert conversation is not None
    return [(message.role, message.text) for message in conversation.messages]


def talk(*turns: Any) -> dict[str, Any]:
    """OpenAI messages: pairs of role and content, or whole objects."""
    return {"messages": [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in turns]}


def shown(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    """A LLaVA record."""
    return {**fields, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


# alpaca


def test_alpaca_joins_instruction_and_input_by_a_newline() -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert said(alpaca(record)) == [("user", "Add.\n1, 2"), ("assistant", "3")]


@pytest.mark.parametrize("extra", [{"input": ""}, {"input": None}, {}])
def test_alpaca_without_input_is_the_instruction_alone(extra: dict[str, Any]) -> None:
    assert said(alpaca({"instruction": "Hi", "output": "Hello", **extra}))[0] == ("user", "Hi")


def test_alpaca_reads_system_and_history() -> None:
    record = {"instruction": "c", "output": "d", "system": "S", "history": [["a", "b"]]}
    assert said(alpaca(record)) == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
    ]  # fmt: skip


@pytest.mark.parametrize("output", ["", "  \n", "<nooutput>"])
def test_alpaca_without_output_is_dropped(output: str) -> None:
    assert alpaca({"instruction": "Hi", "input": "", "output": output}) is None


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"input": "", "output": "x"}, "'instruction' is missing; keys found: 'input', 'output'"),
        ({"instruction": "a", "output": None}, "'output' is None; it must be a string"),
        ({"instruction": "a", "output": 3}, "'output' must be a string, found int: 3"),
        ({"instruction": "a", "output": "b", "history": "x"}, "'history' must be a list of"),
        (
            {"instruction": "a", "output": "b", "history": [["q", "a"], ["q"]]},
            r"history\[1\] must be a pair of strings",
        ),
    ],
)
def test_alpaca_says_what_is_wrong_with_a_record(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        alpaca(record)


# messages


def test_messages_keep_their_order_and_every_system_message() -> None:
    turns = [("system", "A"), ("user", "b"), ("assistant", "c"), ("system", "D"), ("user", "e"), ("assistant", "f")]
    assert said(openai(talk(*turns))) == turns


def test_messages_read_a_developer_as_the_system() -> None:
    assert said(openai(talk(("developer", "A"), ("user", "b"), ("assistant", "c"))))[0] == ("system", "A")


def test_leading_answers_are_dropped_and_system_messages_before_them_kept() -> None:
    turns = [("system", "S"), ("assistant", "Hello"), ("user", "a"), ("assistant", "b")]
    assert said(openai(talk(*turns))) == [turns[0], *turns[2:]]


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("user", "a")],
        [("assistant", "a")],
        [("user", "a"), ("assistant", "")],
        [("user", "a"), ("assistant", None)],
        [("user", "a"), {"role": "assistant", "content": "b", "weight": 0}],
    ],
)
def test_messages_without_a_trained_answer_are_dropped(turns: list[Any]) -> None:
    assert openai(talk(*turns)) is None


@pytest.mark.parametrize(
    ("field", "loss"),
    [
        ({}, None), ({"loss": None}, None), ({"loss": True}, True), ({"loss": False}, False), ({"weight": 0}, False),
        ({"weight": 1}, True), ({"weight": 1.0}, True), ({"loss": "True"}, True), ({"loss": "false"}, False),
        ({"loss": "0"}, False),
    ],
)  # fmt: skip
def test_loss_and_weight_switch_the_training_of_a_message(field: dict[str, Any], loss: bool | None) -> None:
    answer = {"role": "assistant", "content": "b", **field}
    sample = openai(talk(("user", "a"), answer, ("user", "c"), ("assistant", "d")))
    assert sample is not None and sample.messages[1].loss is loss


def test_content_parts_keep_text_and_images_in_their_order() -> None:
    content = [
        {"type": "text", "text": "a "},
        {"type": "image_url", "image_url": {"url": "1.png"}},
        {"type": "text", "text": " b", "image": None},
        {"type": "image", "image": "2.png"},
        {"type": "image_url", "image_url": "3.png"},
        {"type": "image", "url": "4.png"},
    ]
    sample = openai(talk(("user", content), ("assistant", "c")))
    assert sample is not None
    assert sample.messages[0].parts == (
        Text("a "), Image("1.png"), Text(" b"), Image("2.png"), Image("3.png"), Image("4.png"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"text": "x"}, "'messages' is missing; keys found: 'text'"),
        ({}, "'messages' is missing; keys found: none"),
        ({"messages": "x"}, "'messages' must be a list of objects, found str: 'x'"),
        ({"messages": ["x"]}, r"messages\[0\] must be an object, found str"),
        (talk({"content": "x"}), r"messages\[0\]: 'role' is missing; keys found: 'content'"),
        (talk({"role": "user"}), r"messages\[0\]: 'content' is missing; keys found: 'role'"),
        (
            talk(("human", "x")),
            r"role 'human'; allowed: 'system', 'developer', 'user', 'assistant', 'tool', 'function'$",
        ),
        (talk(("user", 3)), "'content' must be a string or a list of parts, found int"),
        (talk(("user", [{"type": "audio"}])), "a part of type 'audio'; allowed: 'text', 'image', 'image_url'"),
        (
            talk(("user", [{"type": "image"}])),
            "a part of type 'image' without a path, and the record's 'images' has no",
        ),
        (talk(("user", [{"type": "text", "text": 1}])), "'text' must be a string, found int"),
        (talk({"role": "assistant", "content": "x", "loss": 0.5}), "'loss' must be true, false, 1 or 0, found 0.5"),
        (talk({"role": "assistant", "content": "x", "weight": [1]}), "'weight' must be true, false, 1 or 0"),
    ],
)
def test_messages_say_what_is_wrong_with_a_record(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        openai(record)


# pretrain


def test_pretrain_keeps_text_exactly_and_drops_what_is_blank() -> None:
    assert pretrain({"text": " a\n"}) == Document(" a\n")
    assert pretrain({"text": " \n"}) is None
    with pytest.raises(DataError, match="'text' is missing; keys found: 'content'"):
        pretrain({"content": "x"})


# llava


def test_llava_keeps_every_image_at_its_place_and_the_text_as_given() -> None:
    record = shown(
        ("human", "Is <image> like\n<image>\n ?"), ("gpt", "No."), ("human", "And <image>"), ("gpt", "Yes."),
        image=["1.jpg", "2.jpg", "3.jpg"],
    )  # fmt: skip
    assert llava(record) == Conversation(
        (
            Message("user", (Text("Is "), Image("1.jpg"), Text(" like\n"), Image("2.jpg"), Text("\n ?"))),
            Message("assistant", (Text("No."),)),
            Message("user", (Text("And "), Image("3.jpg"))),
            Message("assistant", (Text("Yes."),)),
        )
    )


def test_llava_does_not_put_a_mark_at_the_end_to_the_front() -> None:
    sample = llava(shown(("human", "What is it?\n<image>"), ("gpt", "A cat."), image="1.jpg"))
    assert sample is not None and sample.messages[0].parts == (Text("What is it?\n"), Image("1.jpg"))


@pytest.mark.parametrize(("image", "front"), [("1", ["1"]), (["1", "2"], ["1", "2"])])
def test_llava_shows_images_without_marks_before_the_first_question(image: Any, front: list[str]) -> None:
    sample = llava(shown(("system", "S"), ("human", "Hi"), ("gpt", "Hello"), ("human", "x"), image=image))
    assert sample is not None
    assert sample.images == tuple(map(Image, front)) == sample.messages[1].images
    assert sample.messages[1].parts[0] == Image("1")
    assert sample.messages[1].text == "\n" * len(front) + "Hi"


@pytest.mark.parametrize("fields", [{}, {"image": None}, {"image": []}])
def test_llava_without_image_is_text_only(fields: dict[str, Any]) -> None:
    sample = llava(shown(("human", "Hi"), ("gpt", "Hello"), **fields))
    assert said(sample) == [("user", "Hi"), ("assistant", "Hello")]
    assert sample is not None and sample.images == ()


def test_an_image_mark_in_an_answer_is_text() -> None:
    sample = llava(shown(("human", "<image>\nHi"), ("gpt", "I see <image>"), image="1.jpg"))
    assert sample is not None and sample.messages[1].parts == (Text("I see <image>"),)


def test_llava_drops_leading_answers_and_records_without_an_answer() -> None:
    assert said(llava(shown(("gpt", "Hello"), ("human", "a"), ("gpt", "b")))) == [("user", "a"), ("assistant", "b")]
    assert llava(shown(("gpt", "Hello"))) is None
    assert llava(shown(("human", "a"))) is None
    assert llava(shown(("human", "a"), ("gpt", ""))) is None


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (shown(("human", "<image><image>"), ("gpt", "x"), image="1"), "2 <image> marks, 1 image; the numbers must"),
        (shown(("human", "<image>"), ("gpt", "x"), image=["1", "2"]), "1 <image> mark, 2 images"),
        (shown(("human", "<image>"), ("gpt", "x")), "1 <image> mark, 0 images"),
        (shown(("gpt", "x"), image="1"), "1 image, but no turn from 'human'"),
        (shown(("user", "x")), r"conversations\[0\]: from 'user'; allowed: 'human', 'gpt', 'system'"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: 'value' is missing; keys found: 'from'"),
        ({"image": "1"}, "'conversations' is missing; keys found: 'image'"),
        ({"conversations": {"from": "human"}}, "'conversations' must be a list of objects, found dict"),
        (shown(("human", "x"), image=3), "'image' must be a path, a list of paths or null, found 3"),
        (shown(("human", "x"), image=["1", None]), "'image' must be a path, a list of paths or null"),
        (shown(("human", "x"), image=""), "'image' must be a path, a list of paths or null, found ''"),
    ],
)
def test_llava_says_what_is_wrong_with_a_record(record: RawRecord, error: str) -> None:
    with pytest.raises(DataError, match=error):
        llava(record)


# caption


@pytest.mark.parametrize(
    "record",
    [
        {"image": "1.jpg", "caption": "a cat"},
        {"image": "1.jpg", "text": "a cat"},
        shown(("human", "Describe it.\n<image>"), ("gpt", "a cat"), image="1.jpg"),
        shown(("system", "S"), ("human", "Describe it."), ("gpt", "a cat"), image="1.jpg"),
    ],
)
def test_caption_is_the_image_and_its_text_in_every_form(record: RawRecord) -> None:
    assert caption(record) == Conversation((Message("user", (Image("1.jpg"),)), Message("assistant", (Text("a cat"),))))


@pytest.mark.parametrize("record", [{"image": "1", "caption": " "}, shown(("human", "x"), ("gpt", ""), image="1")])
def test_an_empty_caption_is_dropped(record: RawRecord) -> None:
    assert caption(record) is None


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"caption": "x"}, "'image' is missing; keys found: 'caption'"),
        ({"image": "1"}, "needs 'caption', 'text' or 'conversations'; keys found: 'image'"),
        ({"image": "1", "caption": ["x"]}, "'caption' must be a string, found list"),
    ],
)
def test_caption_says_what_is_wrong_with_a_record(record: Mapping[str, Any], error: str) -> None:
    with pytest.raises(DataError, match=error):
        caption(record)

"""Data maps for supervised fine-tuning: Alpaca's columns, OpenAI's messages, a query and its response, a completion."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Message, RawRecord, Sample
from mmft_plugins import _openai, _plain_write, _turns
from mmft_plugins._records import keys_found, text_field
from mmft_plugins._turns import message

NO_OUTPUT = "<nooutput>"  # Alpaca's own mark of a row that has no answer
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def alpaca(record: RawRecord) -> Conversation | None:
    """`instruction`, `input`, `output`, with optional `system` and `history` (pairs of question and answer).

    The question is the instruction, a newline and the input; without an input it is the instruction alone (XTuner's
    `alpaca_map_fn` keeps the newline). Columns: https://github.com/tatsu-lab/stanford_alpaca; `system` and `history`
    as in LLaMA-Factory (data/README.md). None where there is no output.
    """
    return instructed(record)


def instructed(record: RawRecord, suffix: str = "", *, system: str = "") -> Conversation | None:
    """Alpaca's columns with a suffix to their names (`instruction_zh`), and the system text of a record without one."""
    question = text_field(record, f"instruction{suffix}")
    given = text_field(record, f"input{suffix}", default="")
    output = text_field(record, f"output{suffix}")
    system = text_field(record, "system", default="") or system
    if not output.strip() or output.strip() == NO_OUTPUT:
        return None
    head = [message("system", system)] if system else []
    asked = message("user", f"{question}\n{given}" if given else question)
    return _turns.conversation([*head, *_turns.history(record), asked, message("assistant", output)])


def write_alpaca(sample: Sample) -> RawRecord:
    """The way back: the last pair is the row, earlier ones its `history`. `input` stays empty."""
    system, pairs = _plain_write.split_pairs(_plain_write.turns(sample, "alpaca"), "alpaca")
    question, answer = pairs[-1]
    record: dict[str, Any] = {"instruction": question.text, "input": "", "output": answer.text}
    return {**record, **_extras(system, pairs[:-1])}


def _extras(system: str, pairs: list[tuple[Message, Message]]) -> dict[str, Any]:
    earlier = [[_plain_write.marked(question), answer.text] for question, answer in pairs]
    return {**({"system": system} if system else {}), **({"history": earlier} if earlier else {})}


def openai(record: RawRecord) -> Conversation | None:
    """OpenAI messages in full: system or developer, user, assistant, tool; parts, images, tool calls, `loss`."""
    return _openai.read(record)


def query_response(record: RawRecord) -> Conversation | None:
    """`query`, `response`, with optional `system`, `history` and `images` (`<image>` marks say where they stand).

    Columns as in ms-swift (docs/source_en/Customization/Custom-dataset.md). A record without a `query` is asked by its
    `question` or `prompt`, one without a `response` answered by its `answer`.
    """
    asked = next((key for key in ("query", "question", "prompt") if key in record), "query")
    answered = "answer" if "answer" in record and "response" not in record else "response"
    system = text_field(record, "system", default="")
    turns = [message("system", system)] if system else []
    turns += _turns.history(record)
    turns += [
        message("user", text_field(record, asked, default="")),
        message("assistant", text_field(record, answered)),
    ]
    return _turns.conversation(_turns.with_images(turns, _turns.image_list(record, "images")))


def write_query_response(sample: Sample) -> RawRecord:
    """The way back: the last pair is the row, earlier ones its `history`."""
    name = "query_response"
    system, pairs = _plain_write.split_pairs(_plain_write.turns(sample, name, images=True), name)
    question, answer = pairs[-1]
    record: dict[str, Any] = {"query": _plain_write.marked(question), "response": answer.text}
    images = [str(image.source) for asked, _ in pairs for image in asked.images]
    return {**record, **_extras(system, pairs[:-1]), **({"images": images} if images else {})}


def prompt_completion(record: RawRecord) -> Conversation | None:
    """`prompt` and `completion`, both strings or both lists of messages; only the completion is trained.

    Columns as in TRL (docs/source/dataset_formats.md). `system`, `tools` and `images` are read too.
    """
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        system = text_field(record, "system", default="")
        turns = [message("user", prompt), message("assistant", completion)]
        turns = _turns.with_images(turns, _turns.image_list(record, "images"))
        return _turns.conversation([message("system", system), *turns] if system else turns)
    for key in ("prompt", "completion"):
        if record.get(key) is None:
            raise DataError(f"{key!r} is missing; keys found: {keys_found(record)}")
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError("'prompt' and 'completion' must both be strings or both be lists of messages")
    images = iter(_turns.image_list(record, "images"))
    context = _openai.messages_of(record, "prompt", images)
    context = [replace(one, loss=False) for one in context]
    answer = _openai.messages_of(record, "completion", images)
    if left := len(tuple(images)):
        raise DataError(f"{_turns.counted(left, 'image')} without a part of type 'image' to show it in")
    return _turns.conversation([*context, *answer], _turns.tool_schemas(record.get("tools") or record.get("functions")))


CALL: Mapping[str, Any] = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
MESSAGES: tuple[RawRecord, ...] = (
    {
        "messages": [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Red.", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "And this? "}, {"type": "image"}]},
            {"role": "assistant", "content": "Blue.", "loss": True},
        ],
        "images": ["blue.png"],
    },
    {
        "tools": [WEATHER],
        "messages": [
            {"role": "user", "content": "How is the weather in Paris?"},
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": '{"celsius": 21}'},
            {"role": "assistant", "content": "It is 21 °C in Paris."},
        ],
    },
)
messages_map = partial(
    DataMap,
    fn=openai,
    columns=("messages[].role",),
    examples=MESSAGES,
    write=_openai.write,
)


@hookimpl
def mmft_data_maps() -> list[DataMap]:
    """Text formats."""
    summary = "OpenAI messages: roles, images, tools, `loss` or `weight` per message"
    return [
        messages_map(name="openai", summary=summary),
        messages_map(name="messages", summary="the same as openai"),
        DataMap(
            name="alpaca",
            fn=alpaca,
            summary="instruction, input, output; optional system and history",
            columns=("instruction", "output"),
            examples=(
                {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"},
                {
                    "instruction": "And twice that?",
                    "input": "",
                    "output": "6",
                    "system": "You calculate.",
                    "history": [["Add 1 and 2.", "3"]],
                },
            ),
            write=write_alpaca,
        ),
        DataMap(
            name="query_response",
            fn=query_response,
            summary="query, response; optional system, history and images",
            columns=("query", "response"),
            examples=(
                {"query": "Name a colour.", "response": "Red."},
                {
                    "query": "<image>And this?",
                    "response": "Blue.",
                    "system": "You answer briefly.",
                    "history": [["Name a colour.", "Red."]],
                    "images": ["blue.png"],
                },
            ),
            write=write_query_response,
        ),
        DataMap(
            name="qa",
            fn=query_response,
            summary="question, answer; otherwise as query_response",
            columns=("question", "answer"),
            examples=({"question": "How much is 1 + 2?", "answer": "3"},),
        ),
        DataMap(
            name="prompt_response",
            fn=query_response,
            summary="prompt, response; otherwise as query_response",
            columns=("prompt", "response"),
            examples=({"prompt": "Name a colour.", "response": "Red."},),
        ),
        DataMap(
            name="prompt_completion",
            fn=prompt_completion,
            summary="prompt, completion, as strings or lists of messages; only the completion is trained",
            columns=("prompt", "completion"),
            examples=(
                {"prompt": "The sky is", "completion": " blue."},
                {
                    "prompt": [{"role": "user", "content": "What colour is the sky?"}],
                    "completion": [{"role": "assistant", "content": "Blue."}],
                },
            ),
        ),
    ]

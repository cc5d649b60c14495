"""ShareGPT's form: turns of `from` and `value`, with tool calls as turns of their own.

    {"conversations": [{"from": "human", "value": "How warm is it?"},
                       {"from": "function_call", "value": "{\\"name\\": \\"weather\\", \\"arguments\\": {}}"},
                       {"from": "observation", "value": "21"}, {"from": "gpt", "value": "21 degrees."}],
     "system": "...", "tools": "[...]", "images": ["1.jpg"]}

Speakers and the columns beside the turns as in LLaMA-Factory (data/README.md).
"""

import json
from collections.abc import Mapping
from typing import Any

from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Message, RawRecord, Role, Sample
from mmft_plugins import _plain_write, _turns
from mmft_plugins._llava_maps import SPEAKERS, spoken
from mmft_plugins._records import text_field

CALL = "function_call"
ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    CALL: "assistant",
    "observation": "tool",
    "tool": "tool",
}


def sharegpt(record: RawRecord) -> Conversation | None:
    """A conversation with optional `system`, `tools` (a list or its JSON) and `images` (with `<image>` marks).

    A call belongs to the answer before it, so an answer keeps both its text and its calls; calls in a row are parallel.
    Raises `DataError` for a record with LLaVA's column `image`, which this format does not have.
    """
    if record.get("image") is not None:
        raise DataError("has 'image', which is LLaVA's column: use the data map 'llava', or rename it to 'images'")
    system = text_field(record, "system", default="")
    turns = [_turns.message("system", system)] if system else []
    for turn, number in zip(spoken(record, ROLES), range(len(record["conversations"])), strict=True):
        if record["conversations"][number]["from"] == CALL:
            _add_calls(turns, turn.text, f"conversations[{number}]")
        else:
            turns.append(turn)
    turns = _turns.with_images(turns, _turns.image_list(record, "images"), "human")
    return _turns.conversation(turns, _turns.tool_schemas(record.get("tools")))


def _add_calls(turns: list[Message], value: str, where: str) -> None:
    try:
        calls = _turns.tool_calls(value)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if turns and turns[-1].role == "assistant":
        last = turns.pop()
        turns.append(Message("assistant", last.parts, (*last.tool_calls, *calls)))
    else:
        turns.append(Message("assistant", (), calls))


def write_sharegpt(sample: Sample) -> RawRecord:
    """The way back; tools and calls as JSON strings, so that every record has the same columns."""
    turns = _plain_write.turns(sample, "sharegpt", images=True, tools=True)
    said: list[dict[str, str]] = []
    for turn in turns:
        speaker = "observation" if turn.role == "tool" else SPEAKERS[turn.role]
        if turn.parts or not turn.tool_calls:
            said.append({"from": speaker, "value": _plain_write.marked(turn)})
        if turn.tool_calls:
            calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in turn.tool_calls]
            said.append({"from": CALL, "value": json.dumps(calls, ensure_ascii=False)})
    record: dict[str, Any] = {"conversations": said}
    if isinstance(sample, Conversation) and sample.tools:
        record["tools"] = json.dumps([dict(tool) for tool in sample.tools], ensure_ascii=False)
    images = [str(image.source) for turn in turns for image in turn.images]
    return {**record, "images": images} if images else record


def wizardlm(record: RawRecord) -> Conversation | None:
    """`conversations` of `human` and `gpt`, text alone: `<image>` is text here."""
    return _turns.conversation(spoken(record))


SHAREGPT_MAPS: tuple[DataMap, ...] = (
    DataMap(
        name="sharegpt",
        fn=sharegpt,
        summary="conversations of human, gpt, function_call, observation; optional system, tools, images",
        columns=("conversations[].from", "conversations[].value"),
        examples=(
            {
                "conversations": [
                    {"from": "human", "value": "How is the weather in Paris?"},
                    {"from": CALL, "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                    {"from": "observation", "value": '{"celsius": 21}'},
                    {"from": "gpt", "value": "It is 21 °C in Paris."},
                ],
                "system": "You answer briefly.",
                "tools": '[{"name": "weather", "description": "The weather in a city"}]',
            },
            {
                "conversations": [
                    {"from": "user", "value": "Compare <image> with <image>."},
                    {"from": "assistant", "value": "The first is larger."},
                ],
                "images": ["a.jpg", "b.jpg"],
            },
        ),
        write=write_sharegpt,
    ),
    DataMap(
        name="wizardlm",
        fn=wizardlm,
        summary="conversations of human and gpt, text alone",
        columns=("conversations[].from", "conversations[].value"),
        examples=(
            {
                "idx": "1",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
            },
            {
                "conversations": [
                    {"from": "human", "value": "Name a colour."},
                    {"from": "gpt", "value": "Red."},
                    {"from": "human", "value": "Another one?"},
                    {"from": "gpt", "value": "Blue."},
                ],
            },
        ),
    ),
)

"""Tools as Qwen2.5, Qwen3 and Granite 4 write them, after Hermes: schemas in the system turn, calls as JSON in tags.

https://github.com/NousResearch/Hermes-Function-Calling; the sentences are the models' own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmft.types import Conversation, Message, Segment, Text

NINE = re.compile(r"[A-Za-z0-9]{9}")  # the only form of a call's id that Mistral's own templates take

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/tokenizer_config.json, the same in Qwen3
TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def markup(text: str, loss: bool = False) -> list[Segment]:
    """What the template writes; nothing for an empty text."""
    return [Segment(text, loss, markup=True)] if text else []


def as_json(value: Any, indent: int | None = None) -> str:
    """As `tojson` writes it in transformers' chat templates: keys in their order, no escapes for other scripts."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def tool_block(
    tools: Sequence[Mapping[str, Any]], before: str = TOOLS_BEFORE, after: str = TOOLS_AFTER
) -> list[Segment]:
    """What tells the model its tools: one schema a line."""
    lines = "".join(f"\n{as_json(dict(tool))}" for tool in tools)
    return [*markup(before), Segment(lines), *markup(after)]


def tool_calls(message: Message, *, gap: bool = True) -> list[Segment]:
    """The calls an assistant makes, a line break between them and, with `gap`, after a text."""
    segments: list[Segment] = []
    loss = message.is_trained
    for call in message.tool_calls:
        before = "\n" if segments or (gap and (message.text or message.images)) else ""
        segments += markup(f'{before}<tool_call>\n{{"name": "', loss)
        segments += [Segment(call.name, loss), *markup('", "arguments": ', loss)]
        segments.append(Segment(as_json(dict(call.arguments)), loss))
        segments += markup("}\n</tool_call>", loss)
    return segments


def numbered(conversation: Conversation) -> Conversation:
    """Every call and every result with an id of nine letters or digits: its own if it has that form, else its number.

    A result refers to the call whose id it gives, or else to the first of the last turn's calls without a result. What
    a turn gets depends on the turns before it alone, so a prompt stays a prefix of the conversation.
    """
    messages: list[Message] = []
    known: dict[str | None, str] = {}
    waiting: list[str] = []
    count = 0
    for message in conversation.messages:
        if message.tool_calls:
            waiting = []
            for call in message.tool_calls:
                count += 1
                waiting.append(call.id if call.id and NINE.fullmatch(call.id) else f"call{count:05d}")
                known |= {call.id: waiting[-1]} if call.id else {}
            calls = zip(message.tool_calls, waiting, strict=True)
            message = replace(message, tool_calls=tuple(replace(call, id=new) for call, new in calls))
        elif message.role == "tool":
            own = message.call_id if message.call_id and NINE.fullmatch(message.call_id) else None
            new = known.get(message.call_id) or own or next(iter(waiting), f"call{count:05d}")
            waiting = [other for other in waiting if other != new]
            message = replace(message, call_id=new)
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def tool_result(messages: Sequence[Message], index: int, begin: str, end: str) -> list[Segment]:
    """One tool's output; outputs that follow one another share a turn, `begin` to `end`. Never trained.

    `begin` ends in a line break.
    """
    opens = index == 0 or messages[index - 1].role != "tool"
    closes = index + 1 == len(messages) or messages[index + 1].role != "tool"
    body = [Segment(part.text) if isinstance(part, Text) else Segment(part) for part in messages[index].parts]
    return [
        *markup(f"{begin if opens else chr(10)}<tool_response>\n"),
        *body,
        *markup("\n</tool_response>" + (end if closes else "")),
    ]

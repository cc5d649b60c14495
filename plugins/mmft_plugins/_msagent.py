r"""MSAgent-Bench: an assistant that calls APIs between marks and goes on with their results, all in one turn.

    ... <|startofthink|>```JSON\n{"api_name": "tts", "parameters": {"text": "Hi"}}\n```<|endofthink|>
    <|startofexec|>```JSON\n{"wav": "1.wav"}\n```<|endofexec|> Here it is.

XTuner's `msagent_react` rewrites this to ReAct text in Chinese. Here it becomes tool calls and tool messages, so every
chat template that supports tools writes it in its model's own way, and what a tool answers is never a target.
https://modelscope.cn/datasets/damo/MSAgent-Bench.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Message, RawRecord, Text, ToolCall
from mmft_plugins import _turns
from mmft_plugins._llava_maps import spoken
from mmft_plugins._records import keys_found, object_list, shown
from mmft_plugins._sharegpt import ROLES

MARKS = re.compile(r"<\|startof(think|exec)\|>(.*?)<\|endof\1\|>", re.DOTALL)
FENCE = re.compile(r"^\s*```(?:json)?\s*|\s*```\s*$", re.IGNORECASE)


def msagent_react(record: RawRecord) -> Conversation | None:
    """`conversations`, a list or a string that holds one (JSON or a Python literal, which is read and never run).

    The APIs in the system text become tools; a system text that lists APIs is left out, because it teaches the marks.
    None where there is nothing to train.
    """
    tools: list[Mapping[str, Any]] = []
    messages: list[Message] = []
    for number, turn in enumerate(spoken({"conversations": _conversations(record)}, ROLES)):
        try:
            if turn.role == "system" and (found := [_schema(api) for api in _apis(turn.text)]):
                tools += found
            elif turn.role == "assistant":
                messages += _answers(turn.text)
            else:
                messages.append(turn)
        except DataError as error:
            raise DataError(f"conversations[{number}]: {error}") from error
    return _turns.conversation(messages, tuple(tools))


def _conversations(record: RawRecord) -> list[Mapping[str, Any]]:
    value = record.get("conversations")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise DataError(
                    f"'conversations' is a string, but neither JSON nor a Python literal: {shown(value)}"
                ) from error
    if value is None:
        raise DataError(f"'conversations' is missing; keys found: {keys_found(record)}")
    return object_list({"conversations": value}, "conversations")


def _answers(text: str) -> Iterator[Message]:
    """The messages in one turn: text and the calls after it, the result of a call, and so on."""
    said, end = "", 0
    calls: list[ToolCall] = []
    for found in MARKS.finditer(text):
        before, end = text[end : found.start()].strip(), found.end()
        if before and calls:
            yield _answer(said, calls)
            said, calls = "", []
        said = f"{said}\n{before}".strip()
        if found[1] == "think":
            calls.append(_call(found[2]))
            continue
        if said or calls:
            yield _answer(said, calls)
        said, calls = "", []
        yield _turns.message("tool", FENCE.sub("", found[2]).strip())
    rest = text[end:].strip()
    if rest and calls:
        yield _answer(said, calls)
        said, calls = "", []
    said = f"{said}\n{rest}".strip()
    if said or calls:
        yield _answer(said, calls)


def _answer(text: str, calls: list[ToolCall]) -> Message:
    return Message("assistant", (Text(text),) if text else (), tuple(calls))


def _call(text: str) -> ToolCall:
    value = _turns.from_json(FENCE.sub("", text).strip(), "the call between the think marks is not JSON")
    if not isinstance(value, Mapping):
        raise DataError(f"a call must be an object, found {shown(value)}")
    name = value.get("api_name", value.get("name"))
    if name is None:
        raise DataError(f"a call needs 'api_name'; keys found: {keys_found(value)}")
    return _turns.tool_call({"name": name, "arguments": value.get("parameters")})


def _apis(text: str) -> Iterator[Mapping[str, Any]]:
    """The objects with a name and a description inside a text."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, Mapping) and isinstance(value.get("name"), str) and "description" in value:
            yield value
        else:
            end = at + 1
        at = text.find("{", end)


def _schema(api: Mapping[str, Any]) -> Mapping[str, Any]:
    """An API of MSAgent-Bench (its parameters under `paths[0]`) as a tool schema."""
    paths = api.get("paths")
    holder = paths[0] if isinstance(paths, list) and paths and isinstance(paths[0], Mapping) else api
    listed = holder.get("parameters")
    items = (
        [item for item in listed if isinstance(item, Mapping) and "name" in item] if isinstance(listed, list) else []
    )
    properties = {
        str(item["name"]): {"type": _type(item), "description": str(item.get("description", ""))} for item in items
    }
    required = [str(item["name"]) for item in items if str(item.get("required", "")).lower() == "true"]
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": api["name"], "description": str(api["description"]), "parameters": parameters}
    return {"type": "function", "function": function}


def _type(item: Mapping[str, Any]) -> str:
    schema = item.get("schema")
    found = schema.get("type") if isinstance(schema, Mapping) else item.get("type")
    return found if isinstance(found, str) else "string"


_API = (
    '1. {"plugin_name": "speech", "plugin_schema_for_model": {"name": "tts", "description": "Reads a text aloud", '
    '"paths": [{"name": "tts", "parameters": [{"name": "text", "description": "what to read", "required": "True"}]}]}}'
)
_CALL = '<|startofthink|>```JSON\n{"api_name": "tts", "parameters": {"text": "Hi"}}\n```<|endofthink|>'
_RESULT = "<|startofexec|>```JSON\n{'wav': '1.wav'}\n```<|endofexec|>"
_TURNS = [
    {"from": "system", "value": f"You may call these APIs:\n\n{_API}"},
    {"from": "user", "value": "Say Hi."},
    {
        "from": "assistant",
        "value": f"I call the reader.\n{_CALL}\n\n{_RESULT}\nHere it is.",
    },
]
MSAGENT = DataMap(
    name="msagent_react",
    fn=msagent_react,
    summary="MSAgent-Bench: API calls between think and exec marks, as tool calls",
    columns=("conversations",),
    examples=({"conversations": repr(_TURNS)}, {"id": "1", "conversations": json.dumps(_TURNS)}),
)

"""Tool calls read back from what a model wrote: the way back of `_tools`, `_mistral` and Llama's JSON.

What is no call (broken JSON, no name, arguments that are no object) stays text. A mark inside an argument is part of
the argument, because the JSON around it is read first.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmft.types import ToolCall

Read = tuple[str, tuple[ToolCall, ...]]
HERMES = "<tool_call>"
HERMES_END = "</tool_call>"
MISTRAL = "[TOOL_CALLS]"
PYTHON, MORE = "<|python_tag|>", "<|eom_id|>"  # Llama 3.1 writes them before and after some calls
LLAMA_MARKS = (PYTHON, '{"name"', '{"type"')
DECODER = json.JSONDecoder()


def read_hermes(text: str) -> Read:
    """Objects after `<tool_call>`; the line break that parts a text from the first of them is taken off."""
    calls: list[ToolCall] = []
    first = at = text.find(HERMES)
    while at >= 0:
        value, end = decoded(text, at + len(HERMES))
        found = call_of(value)
        if not found and not calls:
            first = text.find(HERMES, end)
        calls += [found] if found else []
        at = text.find(HERMES, end)
    return (text[:first].removesuffix("\n"), tuple(calls)) if calls else (text, ())


def read_llama(text: str) -> Read:
    """An answer that is one JSON object with `name` and `parameters`; the format has no place for a text beside it."""
    written = text.partition(MORE)[0].strip().removeprefix(PYTHON).strip()
    value, end = decoded(written, 0) if written.startswith("{") else (None, 0)
    found = call_of(value, "parameters") or call_of(value)
    return ("", (found,)) if found and end == len(written) else (text, ())


def read_mistral(text: str) -> Read:
    """A list of objects after `[TOOL_CALLS]`; a text before it is left out, as the format has no place for one."""
    _, found, after = text.partition(MISTRAL)
    value, _ = decoded(after, 0) if found else (None, 0)
    calls = tuple(call for call in map(call_of, value if isinstance(value, list) else [value]) if call)
    return ("", calls) if calls else (text, ())


def decoded(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, white space left out, and where it ends; None where there is none."""
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        return DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def call_of(value: Any, key: str = "arguments") -> ToolCall | None:
    """`{"name", "arguments", "id"}` as a call; arguments may be the text of an object, as OpenAI writes them."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get(key)
    if isinstance(arguments, str):
        arguments, _ = decoded(arguments, 0)
    if not isinstance(arguments, Mapping):
        return None
    given = value.get("id")
    return ToolCall(value["name"], arguments, given if isinstance(given, str) and given else None)


def objects(text: str, at: int = 0) -> Iterator[tuple[Any, int, int]]:
    """Every JSON object in a text that lies in no other, with its begin and end."""
    at = text.find("{", at)
    while at >= 0:
        value, end = decoded(text, at)
        if isinstance(value, Mapping):
            yield value, at, end
        at = text.find("{", max(end, at + 1))

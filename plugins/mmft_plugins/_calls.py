"""Tool calls read back from what a model wrote: the way back of `_tools`, Llama's JSON and the families' own modules.

What is no call (broken JSON, no name, arguments that are no object) stays text. A mark inside an argument is part of
the argument, because the JSON around it is read first.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmft.types import ToolCall

Read = tuple[str, tuple[ToolCall, ...]]
HERMES = "<tool_call>"
HERMES_END = "</tool_call>"
MISTRAL = "[TOOL_CALLS]"
INTERNLM = "<|action_start|><|plugin|>"
DEEPSEEK, DEEPSEEK_CALL = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"
DEEPSEEK_NAME = re.compile(r"\s*([^\s<>{}]+?)\s*<｜tool▁sep｜>")
COHERE = "Action:"
COHERE_LIST = re.compile(r"\s*Action:\s*```json\s*(?=\[)")
GLM_NAME = re.compile(r"[ \t]*([\w.:-]+)[ \t]*\n")
PYTHON, MORE = "<|python_tag|>", "<|eom_id|>"  # Llama 3.1 writes them before and after some calls
LLAMA_MARKS = (PYTHON, '{"name"', '{"type"')
DECODER = json.JSONDecoder()


def read_hermes(text: str) -> Read:
    """Objects after `<tool_call>`; the line break that parts a text from the first of them is taken off."""
    said, calls = _after_marks(text, HERMES, "arguments")
    return (said.removesuffix("\n"), calls) if calls else (text, ())


def read_internlm(text: str) -> Read:
    """Objects with `name` and `parameters` between action tokens; vLLM's template for them says `arguments`."""
    return _after_marks(text, INTERNLM, "parameters", "arguments")


def _after_marks(text: str, mark: str, *keys: str) -> Read:
    """Objects after a mark that each of them has, and the text before the first."""
    calls: list[ToolCall] = []
    first = at = text.find(mark)
    while at >= 0:
        value, end = decoded(text, at + len(mark))
        found = next(filter(None, (call_of(value, key) for key in keys)), None)
        if not found and not calls:
            first = text.find(mark, end)
        calls += [found] if found else []
        at = text.find(mark, end)
    return (text[:first], tuple(calls)) if calls else (text, ())


def read_deepseek(text: str) -> Read:
    """A name, a separator and an object after each mark of a call; before the first stands a mark of all of them."""
    calls: list[ToolCall] = []
    first = at = text.find(DEEPSEEK_CALL)
    while at >= 0:
        name = DEEPSEEK_NAME.match(text, at + len(DEEPSEEK_CALL))
        value, end = decoded(text, name.end()) if name else (None, at + len(DEEPSEEK_CALL))
        if name and isinstance(value, Mapping):
            calls.append(ToolCall(name[1], value))
        elif not calls:
            first = text.find(DEEPSEEK_CALL, end)
        at = text.find(DEEPSEEK_CALL, end)
    return (text[:first].removesuffix(DEEPSEEK), tuple(calls)) if calls else (text, ())


def read_command_r(text: str) -> Read:
    """A list of objects with `tool_name` and `parameters` after `Action:`, and the text before that."""
    found = COHERE_LIST.search(text)
    value, _ = decoded(text, found.end()) if found else (None, 0)
    named = ({**one, "name": one.get("tool_name")} for one in value or () if isinstance(one, Mapping))
    calls = tuple(call for call in (call_of(one, "parameters") for one in named) if call)
    return (text[: found.start()], calls) if found and calls else (text, ())


def read_glm(text: str) -> Read:
    """An answer that is a tool's name and, in the next line, an object; an answer in words begins with a line break."""
    name = GLM_NAME.match(text)
    value, end = decoded(text, name.end()) if name else (None, 0)
    if name and isinstance(value, Mapping) and not text[end:].strip():
        return "", (ToolCall(name[1], value),)
    return text, ()


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

"""Tools in chat: which a model may call, what a call gives, and where the calls are in what a model writes.

The chat template decides the form of the calls (`ChatTemplate.read_calls`). Nothing that a model or a tool writes is
executed: a call names a tool and its arguments, and a result is text for the model.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmft.errors import MmftError, UnknownName, did_you_mean
from mmft.generation import Mark
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate, Tool
from mmft.types import ToolCall

log = logging.getLogger("mmft")
MAX_RESULT = 4000  # characters of a result that the model sees
ALL = "all"
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip


@dataclass(frozen=True)
class ToolUse:
    """A call and what the model is told of it; `failed` where that is an error."""

    call: ToolCall
    result: str
    failed: bool = False

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={json.dumps(v, ensure_ascii=False)}" for key, v in self.call.arguments.items())
        return f"{self.call.name}({arguments}) -> {self.result}"


@dataclass(frozen=True)
class Toolbox:
    """The tools that are enabled. `left_out` are those of "all" that cannot be used here, with the reason."""

    tools: tuple[Tool, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tools)

    @property
    def names(self) -> list[str]:
        """Of the tools, in their order."""
        return [tool.name for tool in self.tools]

    @property
    def schemas(self) -> tuple[Mapping[str, Any], ...]:
        """What the model is told of them: `Conversation.tools`."""
        return tuple(tool.schema for tool in self.tools)

    def use(self, call: ToolCall) -> ToolUse:
        """Run a call. Whatever is wrong with it, or happens in the tool, becomes a result that begins with `error:`."""
        if not call.name:  # the format asks for a result where nothing was called
            return ToolUse(call, "None")
        tool = next((tool for tool in self.tools if tool.name == call.name), None)
        if tool is None:
            there_are = f"there are {', '.join(self.names) or 'none'}"
            return _failed(call, f"no tool {call.name!r}{did_you_mean(call.name, self.names)}; {there_are}")
        if problem := wrong_arguments(tool, call.arguments):
            return _failed(call, problem)
        try:
            return ToolUse(call, _cut(str(tool.run(**call.arguments))))
        except MmftError as error:
            return _failed(call, str(error))
        except Exception as error:  # a tool may be anybody's: its bug is not the end of the chat
            log.warning("tool %r failed on %s", call.name, dict(call.arguments), exc_info=True)
            return _failed(call, f"{type(error).__name__}: {error}")


def tool_names(text: str) -> list[str]:
    """Names between commas or spaces."""
    return [name for name in re.split(r"[,\s]+", text) if name]


def toolbox(names: Iterable[str], plugins: Plugins, template: ChatTemplate) -> Toolbox:
    """The tools of these names; "all" are those that can be used here.

    Raises `MmftError` for a name there is not or a tool that cannot be used here, and where the template, which must be
    bound to its tokenizer, has no form for tools or none that can be read back.
    """
    chosen = choose(names, plugins)
    if chosen.tools or chosen.left_out:
        refuse_without_calls(template, plugins)
    return chosen


def choose(names: Iterable[str], plugins: Plugins) -> Toolbox:
    """As `toolbox`, before there is a model."""
    left_out: dict[str, str] = {}
    tools: dict[str, Tool] = {}
    for name in dict.fromkeys(names):
        if name == ALL:
            reasons = {tool.name: (tool, tool.unavailable()) for tool in plugins.tools}
            tools |= {name: tool for name, (tool, reason) in reasons.items() if reason is None}
            left_out |= {name: reason for name, (_, reason) in reasons.items() if reason is not None}
            continue
        tool = plugins.tools.get(name)
        if reason := tool.unavailable():
            raise MmftError(f"tool {name!r} cannot be used: {reason}")
        tools[tool.name] = tool
    return Toolbox(tuple(tools.values()), left_out)


def refuse_without_calls(template: ChatTemplate, plugins: Plugins) -> None:
    """Raise `UnknownName` where a template has no form of calls, with the names of those that have one."""
    if template.read_calls is None:
        others = sorted({other.name for other in plugins.chat_templates if other.read_calls})
        lacks = "no form for tools" if not template.supports_tools else "a form of calls that cannot be read back"
        raise UnknownName(
            f"chat template {template.name!r} has {lacks}; --prompt-template may be one of: {', '.join(others)}"
        )


def wrong_arguments(tool: Tool, arguments: Mapping[str, Any]) -> str:
    """What does not fit the tool's schema, on its first level; empty where all does."""
    properties = tool.parameters.get("properties", {})
    known = {name: schema if isinstance(schema, Mapping) else {} for name, schema in properties.items()}
    needed = [name for name in tool.parameters.get("required", ()) if name not in arguments]
    takes = ", ".join(f"{name} ({_kinds(known[name])})" for name in known) or "no arguments"
    if needed:
        return f"{tool.name} needs {', '.join(map(repr, needed))}; it takes: {takes}"
    for name, value in arguments.items():
        if name not in known:
            if tool.parameters.get("additionalProperties"):
                continue
            return f"{tool.name} has no argument {name!r}; it takes: {takes}"
        kinds = [KINDS[kind] for kind in _names(known[name]) if kind in KINDS]
        if kinds and not any(_is(value, kind) for kind in kinds):
            return f"{tool.name}: {name} must be {_kinds(known[name])}, found {json.dumps(value, ensure_ascii=False)}"
        allowed = known[name].get("enum")
        if allowed is not None and value not in allowed:
            return f"{tool.name}: {name} must be one of {json.dumps(allowed, ensure_ascii=False)}"
    return ""


def _is(value: Any, kind: tuple[type, ...]) -> bool:
    """True and False are no numbers in JSON."""
    return isinstance(value, kind) and (not isinstance(value, bool) or bool in kind)


def _names(schema: Mapping[str, Any]) -> Sequence[str]:
    kind = schema.get("type", ())
    return (kind,) if isinstance(kind, str) else tuple(kind)


def _kinds(schema: Mapping[str, Any]) -> str:
    return " or ".join(_names(schema)) or "any value"


def _failed(call: ToolCall, problem: str) -> ToolUse:
    return ToolUse(call, _cut(f"error: {problem}"), failed=True)


def _cut(text: str) -> str:
    """A result the model has room for, without halves of characters, which no tokenizer takes."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_RESULT else f"{text[:MAX_RESULT]}\n(cut; {len(text):,} characters in all)"


class CallReader:
    """What of an answer the user sees while it comes, and at its end the calls in it.

    Text is shown up to where a call may begin (`ChatTemplate.call_marks`) and the rest held back until the answer is
    whole; control tokens are never shown. `pieces` are those of `Assistant.stream(..., marks=True)`.
    """

    def __init__(self, template: ChatTemplate) -> None:
        assert template.read_calls is not None
        self.shown = ""
        self._template, self._read = template, template.read_calls
        self._all = ""
        self._held: list[tuple[str, bool]] = []  # characters not yet shown, and whether each may ever be
        self._marked = False

    def take(self, piece: str) -> str:
        """What may be shown now."""
        self._all += piece
        self._held += [(character, not isinstance(piece, Mark)) for character in piece]
        if self._marked:
            return ""
        text = "".join(character for character, _ in self._held)
        marks = [at for at in (text.find(mark) for mark in self._template.call_marks) if at >= 0]
        if marks:
            self._marked = True
            return self._show(min(marks))
        ends = (n for mark in self._template.call_marks for n in range(1, len(mark)) if text.endswith(mark[:n]))
        return self._show(len(text) - max(ends, default=0))

    def end(self) -> tuple[str, str, tuple[ToolCall, ...]]:
        """What was held back and is no call; what is said, for the history; and the calls."""
        said, calls = self._read(self._all)
        if calls:
            return "", said, calls
        if not self.shown and said != self._all:  # the format has marks around what is said
            self.shown = said
            return said, said, ()
        rest = self._show(len(self._held))
        return rest, self.shown, ()

    def _show(self, length: int) -> str:
        text = "".join(character for character, may in self._held[:length] if may)
        del self._held[:length]
        text = text if self.shown else text.lstrip()
        self.shown += text
        return text

"""What a chat template writes between what is said: found by rendering it with marks in the place of the texts.

Most chat formats are strings between neighbours: what stands between a question and its answer does not depend on
either. `read_grammar` finds those strings, whatever plugin the template comes from; `chat_jinja` writes them as jinja.
A format that does more (takes thoughts out of the history) has no such grammar, and None says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmft.errors import ConfigError, DataError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Message, Role, Text, ToolCall

FIRST_MARK = 0xF0000  # private use: no template writes it, and none takes it for a special character
NUMBER = "{round}"
ROLES: Sequence[Role] = ("system", "user", "assistant")
PAIRS: Sequence[tuple[Role, ...]] = (
    ("user", "assistant", "user", "assistant", "user"),
    ("user", "user"),
    ("user", "assistant", "assistant"),
)
TOOL_PAIRS: Sequence[tuple[Role, ...]] = (
    ("user", "assistant", "tool", "tool", "assistant"),
    ("user", "assistant", "tool", "user"),
)


@dataclass(frozen=True)
class ToolGrammar:
    """How schemas, calls and results are written; all but the JSON values themselves.

    `plain` and `with_system` are what stands before the first schema, between two, and after the last; `call` what
    stands before a name, between it and the arguments, and after them.
    """

    plain: tuple[str, str, str]
    with_system: tuple[str, str, str, str]  # before the system text, then as in `plain`
    call: tuple[str, str, str]
    after_text: str
    between_calls: str


@dataclass(frozen=True)
class Grammar:
    """The strings of a format. `NUMBER` in one stands for the number of the question.

    `opening` stands before a first question without a system text, `opening_empty` with an empty one, `system` before
    the system text and between it and the question; with `system_last` the text moves into the last question.
    `between`, `ends` and `prompts` go by roles. `trims` are the roles whose texts are stripped.
    """

    opening: str
    opening_empty: str
    system: tuple[str, str]
    system_last: bool
    between: Mapping[tuple[Role, Role], str]
    ends: Mapping[Role, str]
    prompts: Mapping[Role, str]
    trims: frozenset[Role]
    tools: ToolGrammar | None = field(default=None)


class NoGrammar(Exception):
    """The template does more than write strings between texts."""


def read_grammar(template: ChatTemplate) -> Grammar | None:
    """The grammar of a bound template, or None where it has none of this kind. Whether it holds, the proof tells."""
    try:
        between, ends, prompts = _pairs(template, PAIRS)
        opening = _pieces(template, _marked("user"), prompt=False)[0]
        system, system_last = _system(template, opening)
        empty = (Message("system", (Text(""),)), *_marked("user"))
        tools = None
        if template.supports_tools:
            tools, more = _tools(template)
            between, ends, prompts = more[0] | between, more[1] | ends, more[2] | prompts
        return Grammar(
            opening=opening,
            opening_empty=_pieces(template, empty, prompt=False)[0],
            system=system,
            system_last=system_last,
            between=between,
            ends=ends,
            prompts=prompts,
            trims=frozenset(role for role in ROLES if _trims(template, role)),
            tools=tools,
        )
    except NoGrammar:
        return None


def text_of(template: ChatTemplate, messages: Sequence[Message], *, prompt: bool, tools: Sequence[Any] = ()) -> str:
    """What a template writes for text messages. Raises `NoGrammar` where it refuses them."""
    try:
        segments = template.render(Conversation(tuple(messages), tuple(tools)), generation_prompt=prompt)
    except (DataError, ConfigError) as error:  # a base model's template takes one question alone
        raise NoGrammar(str(error)) from error
    return "".join(segment.content for segment in segments if isinstance(segment.content, str))


def _marked(*roles: Role) -> tuple[Message, ...]:
    """Messages whose whole text is one mark each."""
    return tuple(Message(role, (Text(chr(FIRST_MARK + n)),)) for n, role in enumerate(roles))


def _pieces(template: ChatTemplate, messages: Sequence[Message], *, prompt: bool) -> list[str]:
    """What stands before, between and after the marks, which must come once each and in order."""
    return _split(text_of(template, messages, prompt=prompt), [m.text for m in messages if m.text])


def _split(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise NoGrammar("a text is left out, repeated or moved")
        pieces.append(before)
    return [*pieces, text]


Found = tuple[dict[tuple[Role, Role], str], dict[Role, str], dict[Role, str]]


def _pairs(template: ChatTemplate, talks: Sequence[tuple[Role, ...]]) -> Found:
    """What stands between two roles, after the last one, and where an answer is asked for.

    The first talk must work; of the others only what the template takes is known.
    """
    between: dict[tuple[Role, Role], str] = {}
    ends: dict[Role, str] = {}
    prompts: dict[Role, str] = {}
    for talk in talks:
        for length in range(2, len(talk) + 1):
            roles = talk[:length]
            try:
                whole, asked = (_pieces(template, _marked(*roles), prompt=prompt) for prompt in (False, True))
            except NoGrammar:
                if talk is talks[0]:
                    raise
                break
            pair = (roles[-2], roles[-1])
            gap = whole[-2]
            between[pair] = _numbered(between[pair], gap) if pair in between else gap
            ends.setdefault(roles[-1], whole[-1])
            prompts.setdefault(roles[-1], asked[-1])
    whole, asked = (_pieces(template, _marked("user"), prompt=prompt) for prompt in (False, True))
    return between, {**ends, "user": whole[-1]}, {**prompts, "user": asked[-1]}


def _numbered(second: str, third: str) -> str:
    """A gap before the second and before the third question: equal, or equal but for the number."""
    if second == third:
        return second
    if second.replace("2", NUMBER) == third.replace("3", NUMBER):
        return second.replace("2", NUMBER)
    raise NoGrammar("what stands between two turns changes along the talk")


def _system(template: ChatTemplate, opening: str) -> tuple[tuple[str, str], bool]:
    """What stands before and after the system text, and whether it moves to the last question."""
    before, after, _ = _pieces(template, _marked("system", "user"), prompt=False)
    messages = _marked("system", "user", "assistant", "user")
    text = text_of(template, messages, prompt=False)
    marks = [message.text for message in messages]
    if text.find(marks[0]) < text.find(marks[1]):
        _split(text, marks)
        return (before, after), False
    _split(text, [*marks[1:3], marks[0], marks[3]])
    if before != opening:
        raise NoGrammar("the system text moves, and changes what stands before the question")
    return (before, after), True


def _trims(template: ChatTemplate, role: Role) -> bool:
    talks: dict[str, tuple[Role, ...]] = {"system": ("system", "user"), "user": ("user",)}
    talk = talks.get(role, ("user", "assistant"))
    messages = list(_marked(*talk))
    at = next(n for n, message in enumerate(messages) if message.role == role)
    mark = messages[at].text
    plain = text_of(template, messages, prompt=False)
    messages[at] = Message(role, (Text(f" \n {mark}\n \n"),))
    spaced = text_of(template, messages, prompt=False)
    if spaced == plain:
        return True
    if spaced == plain.replace(mark, f" \n {mark}\n \n"):
        return False
    raise NoGrammar("white space is stripped on one side")


def as_json(value: Any) -> str:
    """As `tojson` writes it in transformers' chat templates."""
    return json.dumps(value, ensure_ascii=False)


def _tool(mark: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": mark, "description": "x", "parameters": {}}}


def _tools(template: ChatTemplate) -> tuple[ToolGrammar | None, Found]:
    """The grammar of tools, or None where they are written otherwise than as one JSON value each, all in one place."""
    nothing: Found = ({}, {}, {})
    first, second = (_tool(chr(FIRST_MARK + n)) for n in (8, 9))
    spelled = [as_json(first), as_json(second)]
    try:
        (user,), (system, asker) = _marked("user"), _marked("system", "user")
        plain = _split(text_of(template, [user], prompt=False, tools=[first, second]), [*spelled, user.text])
        told = text_of(template, [system, asker], prompt=False, tools=[first, second])
        with_system = _split(told, [system.text, *spelled, asker.text])
        name, value = chr(FIRST_MARK + 8), chr(FIRST_MARK + 9)
        call, twin = ToolCall(name, {"k": value}), ToolCall("other", {})
        arguments = as_json({"k": value})
        text = chr(FIRST_MARK + 1)
        before, middle, after = _split(_called(template, "", call), [name, arguments])
        said = _split(_called(template, text, call), [text, name, arguments])
        both = _called(template, "", call, twin)
        other = f"{before}other{middle}{{}}{after}"
        if said[2:] != [middle, after] or not said[1].endswith(before) or not both.endswith(other):
            raise NoGrammar("calls are not written alike")
        written = f"{before}{name}{middle}{arguments}{after}"
        if not both.startswith(written):
            raise NoGrammar("calls are not written alike")
        grammar = ToolGrammar(
            plain=(plain[0], plain[1], plain[2]),
            with_system=(with_system[0], with_system[1], with_system[2], with_system[3]),
            call=(before, middle, after),
            after_text=said[1].removesuffix(before),
            between_calls=both.removeprefix(written).removesuffix(other),
        )
        return grammar, _pairs(template, TOOL_PAIRS)
    except NoGrammar:
        return None, nothing


def _called(template: ChatTemplate, text: str, *calls: ToolCall) -> str:
    """An assistant's turn with calls, less what stands around an assistant's turn."""
    question = _marked("user")[0]
    whole = text_of(template, [question, Message("assistant", (Text(text),) if text else (), calls)], prompt=False)
    mark = chr(FIRST_MARK + 15)
    around = text_of(template, [question, Message("assistant", (Text(mark),))], prompt=False)
    before, _, after = around.partition(mark)
    if not whole.startswith(before) or not whole.endswith(after):
        raise NoGrammar("a call changes what stands around an answer")
    return whole[len(before) : len(whole) - len(after)]

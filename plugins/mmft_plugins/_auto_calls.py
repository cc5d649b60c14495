"""Of the chat template `auto`: how a tokenizer's own template writes calls, found by letting it write some.

Two known calls are rendered. What stands before a name, between a name and its arguments, and around an id is then
known without knowing the model. Arguments must be JSON: a template that writes them in another way (XML, Python, an
escaped string) cannot be read back, and None says so.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

from mmft.errors import DataError
from mmft.types import Conversation, Message, Text, ToolCall
from mmft_plugins._auto_mask import OwnFormat, jinja_text, messages_of
from mmft_plugins._calls import Read, decoded

IDS = ("probe1abc", "probe2abc")  # nine letters and digits, the form that Mistral's templates ask for
CALLS = tuple(ToolCall(f"probe_tool_{n}", {f"probe_key_{n}": f"probe value {n}"}, IDS[n]) for n in (0, 1))
ASKED = (Message("user", (Text("x"),)),)
TOOLS = [
    {"type": "function", "function": {"name": call.name, "description": "x", "parameters": {"type": "object"}}}
    for call in CALLS
]
LONGEST_GAP = 200  # characters between the arguments of a call and what begins the next


@dataclass(frozen=True, slots=True)
class CallForm:
    """How one template writes calls, as patterns: `first`, name, `middle`, arguments, perhaps an id; `next`, name, ...

    White space may differ from what the template writes. `marks` are what a call may begin with.
    """

    marks: tuple[str, ...]
    first: str
    middle: str
    next: str
    before_id: str | None


def find_form(own: OwnFormat) -> CallForm | None:
    """The form of a tokenizer's template, or None where calls cannot be read back."""
    one = _answer(own, CALLS[:1])
    found = _places(one, CALLS[0]) if one is not None else None
    if one is None or found is None:
        return None
    name, middle, end = found
    before, after = one[:name], one[end:]
    both = _answer(own, CALLS)
    second = _places(both, CALLS[1]) if both is not None else None
    first = _places(both, CALLS[0]) if both is not None else None
    between = both[first[2] : second[0]] if both is not None and first and second else before
    again = _shared(between[::-1], before[::-1])[::-1] or between
    before_id = after[: after.index(IDS[0])] if IDS[0] in after else None
    if not again.strip():
        return None
    marks, pattern = _marks(before, again)
    form = CallForm(marks, pattern, _pattern(middle), _pattern(again), before_id and _pattern(before_id))
    said, calls = read_calls(form, one)
    known = (replace(CALLS[0], id=IDS[0] if before_id else None),)
    return form if calls == known and not said.strip() else None


def _marks(opening: str, again: str) -> tuple[tuple[str, ...], str]:
    """What a first call may begin with, and its pattern.

    Where each call has a mark of its own, what stands before the first one (a mark around all, empty thoughts) may be
    missing; where a call is bare JSON, all of it is needed to tell a call from other JSON.
    """
    around = opening.strip().removesuffix(again.strip())
    if again.lstrip().startswith(("{", '"')):
        whole = opening.lstrip()
        start = r"\A\s*(?:<\|\w+\|>)?\s*" if whole[0] == "{" else ""  # Llama 3.1 may write <|python_tag|> before it
        return (_mark(whole),), start + _pattern(whole)
    single = around.strip() if around.strip() and not around.split()[1:] else ""
    marks = tuple(dict.fromkeys(_mark(one) for one in (single, again.lstrip()) if one))
    return marks, (f"(?:{_pattern(around)})?" if around else "") + _pattern(again.lstrip())


def _mark(text: str) -> str:
    """The tag a text begins with, or its beginning up to a space or colon."""
    found = re.match(r"<[^<>\s]+>|\[\w+\]|[^\s:]+", text)
    return found[0] if found else text


def _answer(own: OwnFormat, calls: tuple[ToolCall, ...]) -> str | None:
    """What the template writes after the prompt of an answer that makes calls; None where it takes no such answer."""
    for given in (calls, tuple(replace(call, id=None) for call in calls)):
        talk = Conversation((*ASKED, Message("assistant", (), given)))
        try:
            prompt = jinja_text(own, messages_of(Conversation(ASKED), mask=False), TOOLS, True).rstrip(" ")
            whole = jinja_text(own, messages_of(talk, mask=False), TOOLS, False)
        except DataError:
            continue
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        shared = len(_shared(prompt, whole))
        return whole[shared:] if calls[0].name in whole[shared:] else None
    return None


def _places(text: str | None, call: ToolCall) -> tuple[int, str, int] | None:
    """Where a call's name begins, what stands between it and its JSON, and where that ends; None where it is none."""
    name = text.find(call.name) if text else -1
    if text is None or name < 0:
        return None
    after = name + len(call.name)
    at = text.find("{", after)
    while at >= 0:
        value, end = decoded(text, at)
        if value == dict(call.arguments):
            return name, text[after:at], end
        at = text.find("{", at + 1)
    return None


def read_calls(form: CallForm, text: str) -> Read:
    """The text before the calls, and the calls; those whose arguments are no object are left out."""
    calls = tuple(call for call, _ in _calls(form, text))
    if not calls:
        return text, ()
    start = re.search(form.first, text)
    assert start is not None
    return text[: start.start()].removesuffix("\n"), calls


def _calls(form: CallForm, text: str) -> Iterator[tuple[ToolCall, int]]:
    begin = re.search(form.first, text)
    while begin:
        middle = re.compile(rf"([^\s\"'<>{{}}]+?){form.middle}(?=\s*\{{)").match(text, begin.end())
        value, end = decoded(text, middle.end()) if middle else (None, begin.end())
        if middle and isinstance(value, dict):
            call_id = re.compile(form.before_id + r"([\w.:-]+)").match(text, end) if form.before_id else None
            yield ToolCall(middle[1], value, call_id[1] if call_id else None), end
        begin = re.compile(form.next).search(text, end, end + LONGEST_GAP + len(form.next))


def _pattern(text: str) -> str:
    """A text with any white space, or none, where it has some or JSON may have some."""
    pieces = re.split(r"(\s+|(?<=[\[\]{}:,])(?=\S)|(?=[\[\]{}:,])(?<=\S))", text)
    written = "".join(r"\s*" if not piece.strip() else re.escape(piece) for piece in pieces)
    return re.sub(r"(?:\\s\*){2,}", r"\\s*", written)


def _shared(one: str, other: str) -> str:
    """What both texts begin with."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def reader(own: OwnFormat) -> tuple[partial[Read] | None, tuple[str, ...]]:
    """`ChatTemplate.read_calls` and `call_marks` of this tokenizer; None and no marks where there is no form."""
    form = find_form(own) if own.tools else None
    if form is None:
        return None, ()
    return partial(read_calls, form), form.marks

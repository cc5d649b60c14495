"""The chat template `auto`: the tokenizer's own jinja template, with a verified mask.

Jinja gives one string and says neither what in it is trained nor what is data. Both are found by rendering:

* **Data.** The conversation is rendered with a private-use character (a sentinel) in the place of each part of each
  message, and as it is. Where putting the parts for the sentinels, perhaps stripped, gives the second text from the
  first, the parts are data and cannot forge control tokens. A template that rewrites contents fails this; then the
  whole text is markup, and a content that spells a control token is refused.
* **Mask.** Found in the rendering with sentinels, or in the text where that is all markup (`_auto_mask`).

What was found with sentinels holds for every conversation of the same shape (roles, kinds of parts, calls, tools) and
is remembered as a `Plan`. Each conversation then costs one rendering: its own, held against the plan.
"""

import json
import logging
import re
from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from mmft.errors import DataError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Segment, Text
from mmft_plugins._auto_calls import reader
from mmft_plugins._auto_mask import (
    FIRST_SENTINEL,
    OwnFormat,
    Parts,
    Span,
    jinja_text,
    messages_of,
    parts_of,
    trained_spans,
)
from mmft_plugins._tools import numbered

logger = logging.getLogger(__name__)

ANY_SENTINEL = re.compile("[\U000f0000-\U000ffffd]")
PROBE = Conversation(tuple(Message(role, (Text("x"),)) for role in ("user", "assistant", "user", "assistant")))
KNOWN_SHAPES, KNOWN_LENGTH = 500, 100_000  # plans that are remembered, and the characters of one: tools may be huge
CHATML_INSTEAD = "choose 'chatml' with data.allow_template_difference=True"
LOSES_IMAGE = "chat template 'auto': this tokenizer's template loses or repeats an image; choose 'chatml'"

Cut = tuple[Segment | tuple[int, bool], ...]  # a segment, or the number of a slot and whether it is trained
Shape = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What conversations of one shape share.

    Rendered with sentinels they give `before`, then for each of `slots` the part of that number and the text after it.
    `cut` numbers the slots. `refusal` says why an answer cannot be trained.
    """

    before: str
    slots: tuple[tuple[int, str], ...]
    cut: Cut
    keeps_images: bool
    refusal: str


def render_unbound(conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """`auto` before it knows a tokenizer. Always raises `DataError`."""
    raise DataError("chat template 'auto' renders with the model's tokenizer; call for_tokenizer(tokenizer) first")


def bind_auto(tokenizer: Any) -> ChatTemplate:
    """The template of this tokenizer, tried on a conversation of two turns.

    Raises `DataError` where the tokenizer has none, or where not even the last turn can be trained.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "chat template 'auto': the tokenizer has no chat_template (a base model?); choose one by name, "
            "such as 'chatml' or 'vicuna' (mmft plugins lists them)"
        )
    own, plans = OwnFormat.of(tokenizer), dict[Shape, Plan]()
    if own.dated:
        logger.warning(
            "chat template 'auto': this tokenizer's template writes today's date (strftime_now), so the same data "
            "gives other tokens tomorrow and is prepared anew; choose a template by name for a fixed date"
        )
    segments = render_auto(own, plans, PROBE)
    starts = [after for before, after in pairwise([Segment(""), *segments]) if after.loss and not before.loss]
    ends = [str(s.content) for s in segments if s.loss and s.markup and isinstance(s.content, str)]
    end = list(own.added.finditer(ends[-1]))[-1][0]
    read, marks = reader(own)
    return ChatTemplate(
        name="auto",
        render=partial(render_auto, own, plans),
        stop=tuple(dict.fromkeys(token for token in (end, tokenizer.eos_token) if token)),
        supports_tools=own.tools,
        source="the tokenizer's own chat_template",
        rewrites_history=len(starts) < 2,
        read_calls=read,
        call_marks=marks,
    )


def render_auto(
    own: OwnFormat, plans: dict[Shape, Plan], conversation: Conversation, /, *, generation_prompt: bool = False
) -> list[Segment]:
    """Render with the tokenizer's template; where only the last turn's mask is certain, train that turn alone.

    Raises `DataError` where the template refuses the conversation, would lose a part of it, or where the mask of the
    last turn is not certain either. A prompt (`generation_prompt`) is not refused for the sake of its mask. `plans`
    fills with what is known of each shape.
    """
    parts = [part for message in conversation.messages for part in parts_of(message)]
    tools = [dict(tool) for tool in conversation.tools]
    if not own.tools and (tools or any(m.tool_calls or m.role == "tool" for m in conversation.messages)):
        raise DataError(f"chat template 'auto': this tokenizer's template ignores tools; {CHATML_INSTEAD}")
    conversation, written = _written(own, conversation, tools, generation_prompt)
    shape = _shape(conversation, generation_prompt)
    plan = plans.get(shape)
    contents = _contents(plan, written, parts) if plan else None
    if plan is None or (contents is None and own.dated):  # or it is another day now
        plan = _plan(own, conversation, parts, tools, generation_prompt)
        contents = _contents(plan, written, parts)
        _remember(plans, shape, plan)
    if contents is None:
        return _render_as_markup(own, conversation, written, parts, tools, generation_prompt)
    if not plan.keeps_images:
        raise DataError(LOSES_IMAGE)
    if plan.refusal:
        raise DataError(plan.refusal)
    return _filled(plan.cut, contents)


def _written(
    own: OwnFormat, conversation: Conversation, tools: list[Any], generation_prompt: bool
) -> tuple[Conversation, str]:
    """What the template writes; one that refuses calls, as Mistral's does without ids of its form, gets such ids."""
    try:
        return conversation, jinja_text(own, messages_of(conversation, mask=False), tools, generation_prompt)
    except DataError:
        given = numbered(conversation)
        if given == conversation:
            raise
        try:
            return given, jinja_text(own, messages_of(given, mask=False), tools, generation_prompt)
        except DataError:  # it was not the ids
            pass
        raise


def _shape(conversation: Conversation, generation_prompt: bool) -> Shape:
    """All that the rendering with sentinels and the mask depend on."""
    turns = [
        (
            message.role,
            message.is_trained,
            "".join("i" if isinstance(part, Image) else "t" for part in parts_of(message)),
            bool(message.reasoning),
            repr(message.tool_calls) if message.tool_calls else "",
            message.call_id,
        )
        for message in conversation.messages
    ]
    return (generation_prompt, repr(conversation.tools) if conversation.tools else "", *turns)


def _remember(plans: dict[Shape, Plan], shape: Shape, plan: Plan) -> None:
    if len(plans) >= KNOWN_SHAPES:
        plans.clear()
    if len(plan.before) + sum(len(after) for _, after in plan.slots) <= KNOWN_LENGTH:
        plans[shape] = plan


def _plan(own: OwnFormat, conversation: Conversation, parts: Parts, tools: list[Any], generation_prompt: bool) -> Plan:
    """Render with sentinels, and find the answers there.

    Raises `DataError` where the template refuses the conversation, or a tool or a call forges a control token.
    """
    masked = messages_of(conversation, mask=True)
    whole = jinja_text(own, masked, tools, generation_prompt)
    calls = [(m.get("tool_calls"), m.get("tool_call_id")) for m in masked]
    _refuse_forged(own, json.dumps([tools, calls], ensure_ascii=False))
    marks = {chr(FIRST_SENTINEL + number): number for number in range(len(parts))}
    pieces = re.split(f"([{''.join(marks)}])", whole) if marks else [whole]
    slots = tuple((marks[mark], after) for mark, after in zip(pieces[1::2], pieces[2::2], strict=True))
    images = [number for number, part in enumerate(parts) if isinstance(part, Image)]
    keeps_images = [number for number, _ in slots if isinstance(parts[number], Image)] == images
    asked = _asked(whole, generation_prompt)
    spans, refusal = trained_spans(own, conversation, masked, tools, asked)
    refusal = refusal or _loses_text(masked, whole)
    return Plan(pieces[0], slots, _cut(asked, marks, spans), keeps_images, "" if generation_prompt else refusal)


def _loses_text(masked: list[dict[str, Any]], whole: str) -> str:
    """Why a text beside a call cannot be trained: Llama 3.1's and Mistral's own templates leave it out."""
    for number, message in enumerate(masked):
        if message.get("tool_calls") and not all(sentinel in whole for sentinel in message["content"]):
            return (
                f"chat template 'auto': messages[{number}]: this tokenizer's template leaves out the text beside a "
                f"call; take one of them out, or {CHATML_INSTEAD}"
            )
    return ""


def _render_as_markup(
    own: OwnFormat, conversation: Conversation, written: str, parts: Parts, tools: list[Any], generation_prompt: bool
) -> list[Segment]:
    """The conversation where the template changes contents: all its text is markup, so no text may forge any."""
    for part in parts:
        if isinstance(part, Text):
            _refuse_forged(own, part.text)
    images = {chr(FIRST_SENTINEL + n): part for n, part in enumerate(parts) if isinstance(part, Image)}
    contents: Parts = [images[mark] for mark in written if mark in images]
    if contents != list(conversation.images):
        raise DataError(LOSES_IMAGE)
    whole = _asked(written, generation_prompt)
    spans, refusal = trained_spans(own, conversation, messages_of(conversation, mask=False), tools, whole)
    if refusal and not generation_prompt:
        raise DataError(refusal)
    return _filled(_cut(whole, images, spans), contents)


def _asked(whole: str, generation_prompt: bool) -> str:
    """A prompt without the space at its end, which belongs to the answer."""
    return whole.rstrip(" ") if generation_prompt else whole


def _refuse_forged(own: OwnFormat, text: str) -> None:
    if found := own.special.search(text) or ANY_SENTINEL.search(text):
        raise DataError(
            f"chat template 'auto': data spells the control token {found[0]!r} where this tokenizer's template "
            "does not keep data apart; take it out of the data or choose another template"
        )


def _contents(plan: Plan, written: str, parts: Parts) -> Parts | None:
    """What stands in each slot of the plan; None where the two texts do not agree about the rest."""
    if not written.startswith(plan.before):
        return None
    contents: Parts = []
    position = len(plan.before)
    for number, after in plan.slots:
        part = parts[number]
        text = part.text if isinstance(part, Text) else chr(FIRST_SENTINEL + number)
        if not written.startswith(text, position) or not written.startswith(after, position + len(text)):
            forms = (text.lstrip(), text.rstrip(), text.strip())
            stripped = next((form for form in forms if written.startswith(form + after, position)), None)
            if stripped is None:
                return None
            text = stripped
            part = Text(text) if isinstance(part, Text) else part
        contents.append(part)
        position += len(text) + len(after)
    return contents if position == len(written) else None


def _cut(whole: str, marks: Container[str], spans: list[Span]) -> Cut:
    """The text cut at sentinels and where the loss changes."""
    at = [position for position, character in enumerate(whole) if character in marks]
    edges = {0, len(whole), *at, *(position + 1 for position in at), *(edge for span in spans for edge in span)}
    slots = {position: slot for slot, position in enumerate(at)}
    cut: list[Segment | tuple[int, bool]] = []
    for start, stop in pairwise(sorted(edges)):
        loss = any(first <= start < end for first, end in spans)
        cut.append((slots[start], loss) if start in slots else Segment(whole[start:stop], loss, markup=True))
    return tuple(cut)


def _filled(cut: Cut, contents: Parts) -> list[Segment]:
    """The segments, with the data in its places."""
    segments = []
    for piece in cut:
        if isinstance(piece, Segment):
            segments.append(piece)
        else:
            slot, loss = piece
            part = contents[slot]
            segments.append(Segment(part) if isinstance(part, Image) else Segment(part.text, loss))
    return segments

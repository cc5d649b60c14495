"""The chat template `auto`: the tokenizer's own jinja template, with a verified mask.

Jinja gives one string and says neither what in it is trained nor what is data. Both are found by rendering:

* **Data.** The conversation is rendered with a private-use character (a sentinel) in the place of each part of each
  message, and as it is. Where putting the parts for the sentinels, perhaps stripped, gives the second text from the
  first, the parts are data and cannot forge control tokens. A template that rewrites contents fails this; then the
  whole text is markup, and a content that spells a control token is refused.
* **Mask.** Where the template marks answers with `{% generation %}` blocks, one a turn, those are what is trained: less
  the prompt's own end where a block begins before it, through the control token that ends the turn. Else the prompt of
  turn k, as the template writes it for inference, must be a prefix of the conversation up to k, and that, up to the
  control token that ends the turn, a prefix of the whole. What lies between is trained.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from mmft.errors import DataError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Segment, Text

logger = logging.getLogger(__name__)

FIRST_SENTINEL = 0xF0000  # plane 15, private use: 65,534 characters that no text has
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANY_SENTINEL = re.compile("[\U000f0000-\U000ffffd]")
PROBE = Conversation(
    tuple(Message(role, (Text("x"),)) for role in ("user", "assistant", "user", "assistant")),
)
PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}

Contents = list[Text | Image]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class OwnFormat:
    """What is known of a tokenizer: `special` is what data must not spell, `added` is what may end a turn."""

    tokenizer: Any
    special: re.Pattern[str]
    added: re.Pattern[str]
    tools: bool = False
    blocks: bool = False
    prompt: str = ""


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
    added = list(tokenizer.added_tokens_decoder.values())
    special = _any_of(str(token) for token in added if token.special)
    own = OwnFormat(tokenizer, special, _any_of(str(token) for token in added))
    template = str(tokenizer.get_chat_template())
    own = replace(own, tools=_knows_tools(own), blocks=bool(GENERATION.search(template)), prompt=_own_prompt(own))
    if "strftime_now" in template:
        logger.warning(
            "chat template 'auto': this tokenizer's template writes today's date (strftime_now), so the same data "
            "gives other tokens tomorrow and is prepared anew; choose a template by name for a fixed date"
        )
    segments = render_auto(own, PROBE)
    starts = [after for before, after in pairwise([Segment(""), *segments]) if after.loss and not before.loss]
    if len(starts) < 2:
        logger.warning(
            "chat template 'auto': this tokenizer's template rewrites earlier turns, so only the last answer of each "
            "conversation is trained; choose another template, such as 'chatml', to train every answer"
        )
    ends = [str(s.content) for s in segments if s.loss and s.markup and isinstance(s.content, str)]
    end = list(own.added.finditer(ends[-1]))[-1][0]
    return ChatTemplate(
        name="auto",
        render=partial(render_auto, own),
        stop=tuple(dict.fromkeys(token for token in (end, tokenizer.eos_token) if token)),
        supports_tools=own.tools,
        source="the tokenizer's own chat_template",
    )


def render_auto(own: OwnFormat, conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render with the tokenizer's template; where only the last turn's mask is certain, train that turn alone.

    Raises `DataError` where the template refuses the conversation, would lose a part of it, or where the mask of the
    last turn is not certain either. A prompt (`generation_prompt`) is not refused for the sake of its mask.
    """
    parts = [part for message in conversation.messages for part in message.parts if part != Text("")]
    marks = {chr(FIRST_SENTINEL + number): part for number, part in enumerate(parts)}
    masked, real = _messages(conversation, mask=True), _messages(conversation, mask=False)
    tools = [dict(tool) for tool in conversation.tools]
    if not own.tools and (tools or any("tool_calls" in m or m["role"] == "tool" for m in masked)):
        raise DataError("chat template 'auto': this tokenizer's template ignores tools; choose 'chatml'")
    whole, written = (_jinja(own, messages, tools, generation_prompt) for messages in (masked, real))
    contents, messages = _contents(whole, written, marks), masked
    as_markup = [json.dumps([tools, [m.get("tool_calls") for m in masked]], ensure_ascii=False)]
    if contents is None:
        as_markup += [part.text for part in parts if isinstance(part, Text)]
        marks = {mark: part for mark, part in marks.items() if isinstance(part, Image)}
        whole, messages, contents = written, real, [marks[mark] for mark in written if mark in marks]
    for text in as_markup:
        if found := own.special.search(text) or ANY_SENTINEL.search(text):
            raise DataError(
                f"chat template 'auto': data spells the control token {found[0]!r} where this tokenizer's template "
                "does not keep data apart; take it out of the data or choose another template"
            )
    if [part for part in contents if isinstance(part, Image)] != list(conversation.images):
        raise DataError("chat template 'auto': this tokenizer's template loses or repeats an image; choose 'chatml'")
    whole = whole.rstrip(" ") if generation_prompt else whole  # the space belongs to the answer
    spans = _trained_spans(own, conversation, messages, tools, whole, strict=not generation_prompt)
    return _segments(whole, marks, contents, spans)


def _messages(conversation: Conversation, *, mask: bool) -> list[dict[str, Any]]:
    """The messages as transformers' templates take them; an image is a sentinel in either case."""
    messages: list[dict[str, Any]] = []
    number = 0
    for message in conversation.messages:
        content = ""
        for part in message.parts:
            if part != Text(""):
                content += part.text if isinstance(part, Text) and not mask else chr(FIRST_SENTINEL + number)
                number += 1
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
        messages.append({"role": message.role, "content": content, **({"tool_calls": calls} if calls else {})})
    return messages


def _jinja(own: OwnFormat, messages: Sequence[Mapping[str, Any]], tools: list[Any], generation_prompt: bool) -> str:
    if not messages:
        return ""
    try:
        text = own.tokenizer.apply_chat_template(
            list(messages), tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # a template may raise anything: TemplateError, but TypeError or KeyError as well
        raise DataError(
            f"chat template 'auto': this tokenizer's template refuses the conversation: {type(error).__name__}: {error}"
        ) from error
    return str(text)


def _contents(masked: str, real: str, marks: Mapping[str, Text | Image]) -> Contents | None:
    """What each sentinel of `masked` stands for in `real`; None where the two texts do not agree about the rest."""
    pieces = re.split(f"([{''.join(marks)}])", masked) if marks else [masked]
    if not real.startswith(pieces[0]):
        return None
    contents: Contents = []
    position = len(pieces[0])
    for mark, after in zip(pieces[1::2], pieces[2::2], strict=True):
        part = marks[mark]
        text = part.text if isinstance(part, Text) else mark
        forms = (text, text.lstrip(), text.rstrip(), text.strip())
        form = next((form for form in forms if real.startswith(form + after, position)), None)
        if form is None:
            return None
        contents.append(Text(form) if isinstance(part, Text) else part)
        position += len(form + after)
    return contents if position == len(real) else None


def _trained_spans(
    own: OwnFormat,
    conversation: Conversation,
    messages: list[dict[str, Any]],
    tools: list[Any],
    whole: str,
    *,
    strict: bool,
) -> list[Span]:
    """Where the trained answers lie in `whole`: all of them, or the last where the template rewrites earlier ones."""
    turns = [k for k, message in enumerate(conversation.messages) if message.is_trained]
    marked = _marked_spans(own, messages, tools, whole) if own.blocks else None
    if marked is not None and all(k in marked for k in turns):
        return [marked[k] for k in turns]
    spans = [_span(own, messages, tools, k, whole) for k in turns]
    certain = [span for span in spans if not isinstance(span, str)]
    if len(certain) == len(spans):
        return certain
    if certain and certain[-1] == spans[-1]:
        return certain[-1:]
    if not strict:
        return []
    raise DataError(
        f"chat template 'auto': messages[{turns[-1]}] cannot be trained: {spans[-1]}; choose another template"
    )


def _marked_spans(
    own: OwnFormat, messages: list[dict[str, Any]], tools: list[Any], whole: str
) -> dict[int, Span] | None:
    """By number of the message, what the template's generation blocks mark; None where they are not one an answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return {}
    rendered, marked = render_jinja_template(
        conversations=[messages],
        tools=tools or None,
        chat_template=own.tokenizer.get_chat_template(tools=tools or None),
        return_assistant_tokens_mask=True,
        **own.tokenizer.special_tokens_map,
    )
    if len(marked[0]) != len(answers) or not whole.startswith(rendered[0]):
        return None
    spans = (_closed(own, whole, start, stop) for start, stop in marked[0])
    return {k: span for k, span in zip(answers, spans, strict=True) if span}


def _closed(own: OwnFormat, whole: str, start: int, stop: int) -> Span | None:
    """A block from the end of the turn's prompt through the control token that ends the turn, in the block or next."""
    for end in range(start, min(stop, start + len(own.prompt)) + 1):
        if whole.endswith(own.prompt, 0, end):
            start = end
            break
    else:
        return None
    ends = list(own.special.finditer(whole, start, stop)) or list(own.added.finditer(whole, start, stop))
    if ends and not whole[ends[-1].end() : stop].strip():
        return start, ends[-1].end()
    after = own.special.match(whole, stop) or own.added.match(whole, stop)
    return (start, after.end()) if after else None


def _own_prompt(own: OwnFormat) -> str:
    """What the template writes to ask for an answer; empty where that cannot be told."""
    question = _messages(Conversation(PROBE.messages[:1]), mask=False)
    try:
        asked, told = (_jinja(own, question, [], prompt) for prompt in (True, False))
    except DataError:
        return ""
    return asked[len(told) :].rstrip(" ") if asked.startswith(told) else ""


def _span(own: OwnFormat, messages: list[dict[str, Any]], tools: list[Any], k: int, whole: str) -> Span | str:
    """From the end of turn k's prompt to the control token that ends the turn, or why that is not certain."""
    if messages[k]["role"] != "assistant":
        return "'auto' can train the assistant's messages only"
    if k == 0:
        return "the conversation begins with it, and the template has no prompt for that"
    try:
        prompt = _jinja(own, messages[:k], tools, True).rstrip(" ")
        upto = _jinja(own, messages[: k + 1], tools, False)
    except DataError as error:
        return f"its prompt cannot be rendered alone ({error})"
    if not upto.startswith(prompt):
        return f"its prompt (…{prompt[-40:]!r}) is not a prefix of the template's text of the turn"
    answer = upto[len(prompt) :]
    ends = list(own.special.finditer(answer)) or list(own.added.finditer(answer))
    if not ends or answer[ends[-1].end() :].strip():
        return "the template ends it with no control token, so a model would not learn to stop"
    if "tool_calls" not in messages[k]:  # a text ends at the first: Phi-3-small writes <|end|>, then <|endoftext|>
        while len(ends) > 1 and not answer[ends[-2].end() : ends[-1].start()].strip():
            ends.pop()
    end = len(prompt) + ends[-1].end()
    if not whole.startswith(upto[:end]):
        return "the template writes it otherwise when other messages follow"
    return len(prompt), end


def _segments(whole: str, marks: Mapping[str, Text | Image], contents: Contents, spans: list[Span]) -> list[Segment]:
    """The text cut at sentinels and where the loss changes."""
    at = [position for position, character in enumerate(whole) if character in marks]
    edges = {0, len(whole), *at, *(position + 1 for position in at), *(edge for span in spans for edge in span)}
    data = dict(zip(at, contents, strict=True))
    segments = []
    for start, stop in pairwise(sorted(edges)):
        loss = any(first <= start < end for first, end in spans)
        part = data.get(start)
        if isinstance(part, Image):
            segments.append(Segment(part))
        elif part is not None:
            segments.append(Segment(part.text, loss))
        else:
            segments.append(Segment(whole[start:stop], loss, markup=True))
    return segments


def _knows_tools(own: OwnFormat) -> bool:
    """Whether the template writes anything else when it is given a tool."""
    question = _messages(Conversation(PROBE.messages[:1]), mask=False)
    try:
        return _jinja(own, question, [PROBE_TOOL], False) != _jinja(own, question, [], False)
    except DataError:
        return False


def _any_of(spellings: Any) -> re.Pattern[str]:
    longest_first = sorted(set(spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

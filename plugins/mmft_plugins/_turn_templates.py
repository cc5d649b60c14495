"""Chat formats written as strings: one line of text for each kind of turn, and the one function that renders them.

`{text}` stands for what is said, `{bos}` and `{eos}` for the tokenizer's tokens, `{round}` for the number of the
question. An answer is trained from its first character to its end token; what `after` adds is not trained.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mmft.errors import DataError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Message, Segment, Text
from mmft_plugins.templates import own_bos, refuse_tools

logger = logging.getLogger("mmft")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStrings:
    """The strings of one format.

    `system`, `user` and `answer` hold `{text}`; `header` opens an answer, `begin` the conversation. With
    `merges_system` a system text is written at the start of the next question, inside the user's turn. `strips`: the
    format trims questions and answers. `bos` and `eos` are what the format's own tokenizer has; an empty `bos` leaves
    it to the tokenizer whether a text begins with one. `tokens` are the control tokens a tokenizer needs, `also_stops`
    what ends an answer beside its own end.
    """

    name: str
    source: str
    user: str
    answer: str
    system: str
    begin: str = ""
    header: str = ""
    after: str = ""
    merges_system: bool = False
    strips: bool = False
    bos: str = ""
    eos: str = "</s>"
    tokens: tuple[str, ...] = ()
    also_stops: tuple[str, ...] = ()


def turn_template(form: TurnStrings) -> ChatTemplate:
    """The template of a format; unbound it writes the tokens of the format's own tokenizer."""
    return replace(_filled(form, form.bos, form.eos), bind=partial(bind_turns, form))


def bind_turns(form: TurnStrings, tokenizer: Any) -> ChatTemplate:
    """The format with this tokenizer's BOS and EOS; warns where the tokenizer would spell control tokens as text.

    Raises `DataError` where the format ends its turns with the EOS and the tokenizer has none.
    """
    eos = tokenizer.eos_token
    if not eos and "{eos}" in form.answer:
        raise DataError(
            f"chat template {form.name!r}: the tokenizer has no end-of-sequence token to end an answer with; "
            "give it one or choose a format with an end token of its own"
        )
    warn_of_missing(form.name, form.tokens, tokenizer)
    # transformers 5 prepends Llama's <s> only if tokenizer_config.json says add_bos_token; these formats have it.
    bos = form.bos if form.bos and tokenizer.bos_token == form.bos else own_bos(tokenizer)
    bound = _filled(form, bos, eos or "")
    return replace(bound, stop=tuple(dict.fromkeys([*bound.stop, *([eos] if eos else [])])))


def warn_of_missing(name: str, tokens: Sequence[str], tokenizer: Any) -> None:
    """Warn where the tokenizer would spell control tokens of the format as text."""
    if missing := [token for token in tokens if token not in tokenizer.get_vocab()]:
        logger.warning(
            "chat template %r: the tokenizer has no token for %s and spells it as text; "
            "take the model's own template ('auto') or one whose tokens it has",
            name,
            ", ".join(missing),
        )


def render_turns(form: TurnStrings, conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render a format whose `{bos}` and `{eos}` are filled in.

    Raises `DataError` where the conversation has tools: none of these formats has a form for them.
    """
    refuse_tools(form.name, conversation)
    segments, held, rounds = _markup(form.begin), list[Segment](), 0
    for message in conversation.messages:
        if message.role == "system":
            block = _around(form.system, _content(message))
            held, segments = (held + block, segments) if form.merges_system else (held, segments + block)
        elif message.role == "user":
            rounds += 1
            segments += _around(_in_round(form.user, rounds), [*held, *_content(_trimmed(form, message))])
            held = []
        else:
            if held:  # no question to merge it into
                rounds, segments, held = rounds + 1, segments + _around(_in_round(form.user, rounds + 1), held), []
            answer = _around(form.answer, _content(_trimmed(form, message)), message.is_trained)
            segments += [*_markup(form.header), *answer, *_markup(form.after)]
    if held:
        segments += _around(_in_round(form.user, rounds + 1), held)
    return segments + (_markup(form.header) if generation_prompt else [])


def _filled(form: TurnStrings, bos: str, eos: str) -> ChatTemplate:
    """The template with the tokens in their places."""
    strings = {
        field: getattr(form, field).replace("{bos}", bos).replace("{eos}", eos)
        for field in ("begin", "system", "user", "header", "answer", "after")
    }
    filled = replace(form, **strings)
    end = filled.answer.partition("{text}")[2].strip()
    return ChatTemplate(
        name=form.name, render=partial(render_turns, filled), stop=(end, *form.also_stops), source=form.source
    )


def _in_round(pattern: str, number: int) -> str:
    return pattern.replace("{round}", str(number))


def _around(pattern: str, body: Sequence[Segment], loss: bool = False) -> list[Segment]:
    before, _, after = pattern.partition("{text}")
    return [*_markup(before, loss), *body, *_markup(after, loss)]


def _markup(text: str, loss: bool = False) -> list[Segment]:
    return [Segment(text, loss, markup=True)] if text else []


def _content(message: Message) -> list[Segment]:
    loss = message.is_trained
    return [Segment(part.text, loss) if isinstance(part, Text) else Segment(part) for part in message.parts]


def _trimmed(form: TurnStrings, message: Message) -> Message:
    """The message less the white space around its whole content, where the format trims."""
    if not form.strips:
        return message
    parts = [part for part in message.parts if part != Text("")]
    while parts and isinstance(first := parts[0], Text):
        parts[0] = Text(first.text.lstrip())
        if parts[0] != Text(""):
            break
        del parts[0]
    while parts and isinstance(last := parts[-1], Text):
        parts[-1] = Text(last.text.rstrip())
        if parts[-1] != Text(""):
            break
        del parts[-1]
    return replace(message, parts=tuple(parts))

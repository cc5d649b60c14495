"""Template proof: a chat template by name must write the token ids of the model's own jinja template.

Over a battery of conversations the named template is rendered and tokenised as in training, the model's own template
by transformers' `apply_chat_template`. Allowed to differ: white space that one of them writes after everything else,
the space at the end of a prompt (ours belongs to the answer), and an end-of-turn token after the last answer where
the model's template leaves it to generation. Where the model's own template changes a turn once others follow, only
the prompt is compared, because that is what inference shows. Today's date in a template is pinned for the comparison.

Three things are checked of every template, `auto` too and also where the model has no template of its own: each
trained turn ends in a stop string, that string is one token, and text of a user that spells a control token gives none.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from typing import Any

from mmft.config import Data
from mmft.data.proof_cases import CASES, Case, as_messages, forged_case
from mmft.data.tokenize import Tokenizer, tokenize
from mmft.errors import ConfigError, DataError, Problem
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Segment, Text

logger = logging.getLogger(__name__)

DATE = datetime(2024, 7, 26)  # what Llama 3.1's and 3.2's own templates write where they are given no clock
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
SHOWN = 60  # characters of a difference shown on either side of the place
Ids = list[int]


@dataclass(frozen=True, slots=True)
class Difference:
    """A case in which the named template fails: `ours` and `theirs` are texts that part at character `place`.

    `theirs` is None where nothing is compared and `what` says everything.
    """

    case: str
    what: str
    ours: str = ""
    theirs: str | None = None
    place: int = 0

    def __str__(self) -> str:
        if self.theirs is None:
            return f"{self.case}: {self.what}"
        start = max(0, self.place - SHOWN)
        head = _visible(self.ours[start : self.place])
        lead = "…" if start else ""
        ours, theirs = (_visible(text[self.place : self.place + SHOWN]) for text in (self.ours, self.theirs))
        return (
            f"{self.case}: {self.what}\n"
            f"  this template  {lead}{head}{ours or '(nothing)'}\n"
            f"  the model's    {lead}{head}{theirs or '(nothing)'}\n"
            f"                 {' ' * len(lead + head)}^ first difference"
        )


def prove_template(template: ChatTemplate, tokenizer: Tokenizer) -> list[Difference]:
    """What this template does otherwise than the tokenizer's own, and where it breaks a rule of every template.

    An empty list is the proof. A template with `compare=False` is no chat format and is exempt. Raises `DataError`
    where the template cannot be bound to the tokenizer.
    """
    if not template.compare:
        return []
    bound = template.for_tokenizer(tokenizer.hf)
    found = _unknown_stops(bound, tokenizer)
    compared = bool(tokenizer.hf.chat_template) and template.name != "auto"
    if not tokenizer.hf.chat_template:
        logger.info("chat template %r: the model has none of its own to compare with", template.name)
    for case in CASES:
        if case.conversation.tools and not bound.supports_tools:
            continue
        if compared and case.conversation.images:
            found += _image_differences(bound, tokenizer, case)
        elif compared:
            found += _id_differences(bound, tokenizer, case)
        if not case.conversation.images:
            found += _label_differences(bound, tokenizer, case)
    return [*found, *_forged(bound, tokenizer)]


def refuse_difference(template: ChatTemplate, tokenizer: Tokenizer, data: Data) -> None:
    """Raise `ConfigError` with the proof's differences, or log them where `data.allow_template_difference` is set."""
    try:
        found = prove_template(template, tokenizer)
    except DataError as error:
        raise ConfigError([Problem("data.chat_template", str(error))]) from error
    if not found:
        return
    number = "1 difference" if len(found) == 1 else f"{len(found)} differences"
    text = f"{template.name!r} is not the chat template this model was made with ({number}):\n" + report(found)
    if data.allow_template_difference:
        logger.warning("data.chat_template: %s", text)
        return
    raise ConfigError(
        [
            Problem(
                "data.chat_template",
                text + "\n",
                "use chat_template='auto' or one that fits, or set data.allow_template_difference=True to train anyway",
            )
        ]
    )


def report(found: Sequence[Difference], limit: int = 3) -> str:
    """The first differences, each side by side, and how many more there are."""
    lines = [str(difference) for difference in found[:limit]]
    return "\n".join(lines + ([f"and {len(found) - limit} more"] if len(found) > limit else []))


def _id_differences(template: ChatTemplate, tokenizer: Tokenizer, case: Case) -> list[Difference]:
    """The whole conversation and the prompt of its last answer, ours against the model's own."""
    whole = case.conversation
    question = replace(whole, messages=whole.messages[:-1])
    try:
        texts = [_theirs(tokenizer, part, prompt=prompt) for part, prompt in ((whole, False), (question, True))]
    except Exception as error:  # a template may raise anything: TemplateError, but TypeError or KeyError as well
        logger.debug("template proof, %s: skipped, the model's own template refuses it: %s", case.name, error)
        return []
    if whole.tools and texts[1] == _theirs(tokenizer, replace(question, tools=()), prompt=True):
        logger.debug("template proof, %s: skipped, the model's own template ignores tools", case.name)
        return []
    pairs = [("the prompt", question, True, texts[1])]
    if texts[0].startswith(texts[1].rstrip(" ")):
        pairs.insert(0, ("the conversation", whole, False, texts[0]))
    else:
        logger.debug("template proof, %s: the model's own template rewrites it; the prompt is compared", case.name)
    for what, part, prompt, theirs in pairs:
        try:
            ours = _ours(template, tokenizer, part, prompt=prompt)
        except DataError as error:
            return [Difference(case.name, f"this template refuses what the model's own takes: {error}")]
        difference = _difference(case.name, what, ours, theirs, tokenizer, template.stop)
        if difference:
            return [difference]
    return []


def _theirs(tokenizer: Tokenizer, conversation: Conversation, *, prompt: bool, parts: bool = False) -> str:
    tools = [dict(tool) for tool in conversation.tools] or None
    pinned = CLOCK.sub(lambda call: repr(DATE.strftime(call[2])), tokenizer.hf.get_chat_template(tools=tools))
    text: str = tokenizer.hf.apply_chat_template(
        as_messages(conversation, parts=parts),
        tools=tools,
        chat_template=pinned,
        tokenize=False,
        add_generation_prompt=prompt,
    )
    return text


def _ours(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, *, prompt: bool) -> Ids:
    ids: Ids = tokenize(template.render(conversation, generation_prompt=prompt), tokenizer).input_ids.tolist()
    return ids


def _difference(
    case: str, what: str, ours: Ids, text: str, tokenizer: Tokenizer, stop: Sequence[str]
) -> Difference | None:
    """None where the ids are equal but for what may follow at the end."""
    theirs: Ids = tokenizer.encode([text])[0].tolist()
    common = _common(ours, theirs)
    rest = [_text(ids[common:], tokenizer) for ids in (ours, theirs)]
    if not rest[1].strip() and (not rest[0].strip() or rest[0].strip() in stop):
        return None
    mine, head = _text(ours, tokenizer), _text(ours[:common], tokenizer)
    if mine == text:
        return Difference(case, f"{what} is the same text in other tokens", mine, text, len(head))
    return Difference(case, f"{what} differs", mine, text, _common(mine, text))


def _common(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How much of the two is equal from the start."""
    unequal = (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return next(unequal, min(len(ours), len(theirs)))


def _text(ids: Ids, tokenizer: Tokenizer) -> str:
    return str(tokenizer.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _image_differences(template: ChatTemplate, tokenizer: Tokenizer, case: Case) -> list[Difference]:
    """Where the model's own template takes images, ours puts them between the same texts."""
    try:
        theirs = _theirs(tokenizer, case.conversation, prompt=False, parts=True)
    except Exception as error:  # as above
        logger.debug("template proof, %s: skipped, the model's own template takes no images: %s", case.name, error)
        return []
    without = tuple(
        replace(m, parts=tuple(p for p in m.parts if isinstance(p, Text))) for m in case.conversation.messages
    )
    if "{'type'" in theirs or theirs == _theirs(tokenizer, Conversation(without), prompt=False, parts=True):
        logger.debug("template proof, %s: skipped, the model's own template takes no images", case.name)
        return []
    position, after_image = 0, False
    for is_image, run in groupby(template.render(case.conversation), key=lambda s: isinstance(s.content, Image)):
        text = "" if is_image else _run_text(list(run)).strip()
        at = theirs.find(text, position)
        if at < 0 or (text and after_image and at == position):
            return [Difference(case.name, f"before or after {text!r}, images stand elsewhere than in {theirs!r}")]
        position, after_image = at + len(text), is_image
    return []


def _label_differences(template: ChatTemplate, tokenizer: Tokenizer, case: Case) -> list[Difference]:
    """Each trained stretch ends with a stop string, and the last answer is trained."""
    try:
        segments = template.render(case.conversation)
    except DataError as error:
        logger.debug("template proof, %s: labels not checked: %s", case.name, error)
        return []
    runs = [_run_text(list(run)) for loss, run in groupby(segments, key=lambda segment: segment.loss) if loss]
    if not runs:
        return [Difference(case.name, "no token is trained")]
    for text in runs:
        if template.stop and not text.endswith(template.stop):
            return [
                Difference(
                    case.name,
                    f"a trained turn ends in {text[-20:]!r} and not in what ends a turn ({', '.join(template.stop)}), "
                    "so a model would not learn to stop",
                )
            ]
    return []


def _run_text(run: Sequence[Segment]) -> str:
    return "".join(segment.content for segment in run if isinstance(segment.content, str))


def _unknown_stops(template: ChatTemplate, tokenizer: Tokenizer) -> list[Difference]:
    """A stop string that looks like a control token and is none here would be written, and generated, as text."""
    found = []
    for stop in template.stop:
        pieces = len(tokenizer.encode([stop])[0])
        if stop.startswith("<") and stop.endswith(">") and pieces != 1:
            what = f"this tokenizer has no control token {stop!r}: it would be written as text of {pieces} tokens"
            found.append(Difference("control tokens", what))
    return found


def _forged(template: ChatTemplate, tokenizer: Tokenizer) -> list[Difference]:
    """Text of a user that spells control tokens must give none of them. The model's own template would."""
    control = {str(token): number for number, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    harmless, forged = forged_case(list(control)[:8])
    try:
        ids = [_ours(template, tokenizer, conversation, prompt=False) for conversation in (harmless, forged)]
    except DataError as error:  # `auto` may refuse them, which is as safe
        logger.debug("template proof, text that spells control tokens: refused: %s", error)
        return []
    counts: list[Mapping[int, int]] = [{number: each.count(number) for number in control.values()} for each in ids]
    wrong = [token for token, number in control.items() if counts[0][number] != counts[1][number]]
    if not wrong:
        return []
    return [Difference("text that spells control tokens", f"a user could forge {', '.join(map(repr, wrong))}")]


def _visible(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")

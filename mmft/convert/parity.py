"""The parity gate: what a conversion gives is run beside the model it came from, before it is called done.

The probes are those of `probes`. The source writes a greedy answer to each; then both read prompt and answer,
and their logits are compared wherever a token of the answer was chosen. Comparing along the source's answer keeps one
near-tie from turning into two different texts, so the numbers measure the weights and nothing else.
"""

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmft import __version__
from mmft.convert.place import PARITY as PARITY
from mmft.convert.place import refuse_out
from mmft.data.tokenize import Tokenizer
from mmft.errors import ConfigError, DataError, MmftError, ModelError
from mmft.modeling.checkpoint import MANIFEST, or_nothing, publish
from mmft.types import Conversation

MAX_NEW_TOKENS = 12
# Root mean square of the logits' difference over that of the logits themselves (less their mean). In float32 measured
# on tiny random models of six families: 2.4e-6. In bfloat16 the arithmetic alone moves a trained model of 30 layers by
# up to 0.108 (the demo, asked in float32 and in bfloat16; merged or not: 0.071), in float16 by 0.0078 (merged or not:
# 0.020, as the probe of white space has it; its merged weights are those of float32 to the last bit of float16). Tiny
# random models of four families: 0.033 and 0.0036, merged or not 0.028 and 0.0049 (docs/benchmarks.md).
# What must fail, on the demo: no adapter 0.5 to 2.5, the encoder's layer before 0.46 to 0.68, an adapter at 0.9 of its
# size 0.09 to 0.35. A single matrix without its adapter, 0.03 to 0.1, shows in float32 alone.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.15}
INT8_TOLERANCE = 0.15  # LLM.int8() rounds the activations too, which no plain model does


class ParityError(MmftError):
    """A conversion does not give what its source gives."""


@dataclass(frozen=True)
class Answer:
    """What the source says to a probe. `logits` float32[n + 1, V], one row for each token chosen and the next."""

    name: str
    conversation: Conversation
    prompt: list[int]
    pixels: Tensor | None
    tokens: list[int]
    logits: Tensor


@dataclass(frozen=True)
class LeftOut:
    """A probe that was not asked, because the source's chat template has no form for it."""

    name: str
    conversation: Conversation
    reason: str


@dataclass(frozen=True)
class Outcome:
    """One probe, compared. `relative` is the measure of `TOLERANCE`; `flips` are other choices, no near-ties."""

    probe: str
    same_prompt: bool
    pixel_difference: float
    max_difference: float
    relative: float
    flips: int
    same_answer: bool
    answer: str


@dataclass(frozen=True)
class Report:
    """All probes of a conversion; `verified` means that every one is within the tolerance.

    `left_out` says of each probe that was not asked why; `note` is what a person must know to open the result, or why
    it was not verified, and `command` is how to do that then.
    """

    verified: bool
    dtype: str
    tolerance: float
    outcomes: tuple[Outcome, ...]
    refusal: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    note: str = ""
    command: str = ""


class Result(Protocol):
    """A converted model, to be asked what its source was asked."""

    def inputs(self, conversation: Conversation) -> tuple[list[int], Tensor | None]:
        """The prompt's ids and the pixels, as users of the result get them."""
        ...

    def logits(self, conversation: Conversation, tokens: Sequence[int]) -> Tensor:
        """float32[n + 1, V]: after the prompt and after each of `tokens`."""
        ...

    def greedy(self, conversation: Conversation, max_new_tokens: int) -> list[int]:
        """Its own greedy answer."""
        ...


def ask_source(source: Result, asked: Sequence[tuple[str, Conversation]]) -> list[Answer | LeftOut]:
    """The source's answers. Probes that its template has no form for are left out, and say why.

    Raises `ModelError` where that leaves no probe, or a model that sees without a picture: nothing would be proved.
    """
    answers: list[Answer | LeftOut] = []
    for name, conversation in asked:
        try:
            prompt, pixels = source.inputs(conversation)
        except (DataError, ConfigError) as error:
            answers.append(LeftOut(name, conversation, str(error).splitlines()[0]))
            continue
        if not prompt:
            answers.append(LeftOut(name, conversation, "the chat template writes nothing"))
            continue
        tokens = source.greedy(conversation, MAX_NEW_TOKENS)
        logits = source.logits(conversation, tokens)
        answers.append(Answer(name, conversation, prompt, pixels, tokens, logits))
    for kind, of_kind in (("", answers), (" with a picture", [one for one in answers if one.conversation.images])):
        reasons = [one.reason for one in of_kind if isinstance(one, LeftOut)]
        if reasons and len(reasons) == len(of_kind):
            raise ModelError(
                f"no probe{kind} could be asked, so nothing would be proved: {reasons[0]}; train with a chat template "
                "that takes questions and pictures"
            )
    return answers


def compare(
    answers: Sequence[Answer | LeftOut], result: Result, tokenizer: Tokenizer, *, dtype: torch.dtype, tolerance: float
) -> Report:
    """Ask the result what the source was asked. Raises nothing for a difference: the report says it."""
    outcomes, refusal = [], ""
    left_out = {one.name: one.reason for one in answers if isinstance(one, LeftOut)}
    for answer in answers:
        if isinstance(answer, LeftOut):
            continue
        outcome = _compare_one(answer, result, tokenizer, tolerance)
        outcomes.append(outcome)
        refusal = refusal or _refusal(outcome, tolerance)
    if not outcomes:
        refusal = "no probe could be asked: the chat template takes none of them"
    return Report(not refusal, str(dtype).removeprefix("torch."), tolerance, tuple(outcomes), refusal, left_out)


def _compare_one(answer: Answer, result: Result, tokenizer: Tokenizer, tolerance: float) -> Outcome:
    ids, pixels = result.inputs(answer.conversation)
    text = str(tokenizer.hf.decode(answer.tokens, skip_special_tokens=True))
    pixel_difference = 0.0
    if answer.pixels is not None:
        same_shape = pixels is not None and pixels.shape == answer.pixels.shape
        pixel_difference = float((pixels - answer.pixels).abs().max()) if same_shape and pixels is not None else 1e9
    if ids != answer.prompt or pixel_difference == 1e9:
        return Outcome(answer.name, ids == answer.prompt, pixel_difference, 1e9, 1e9, 0, False, text)
    theirs = result.logits(answer.conversation, answer.tokens)
    vocabulary = min(theirs.shape[1], answer.logits.shape[1])  # one row more where the image token got one
    ours, theirs = answer.logits[:, :vocabulary], theirs[:, :vocabulary]
    size = float((ours - ours.mean(1, keepdim=True)).square().mean().sqrt())
    difference = (theirs - ours).abs()
    chosen = theirs.argmax(1, keepdim=True)
    lead = ours.max(1, keepdim=True).values - ours.gather(1, chosen)  # by how much the source preferred its own choice
    return Outcome(
        probe=answer.name,
        same_prompt=True,
        pixel_difference=pixel_difference,
        max_difference=float(difference.max()),
        relative=float(difference.square().mean().sqrt()) / max(size, 1e-12),
        flips=int((lead > 2 * tolerance * size).sum()),
        same_answer=result.greedy(answer.conversation, MAX_NEW_TOKENS) == answer.tokens,
        answer=text,
    )


def _refusal(outcome: Outcome, tolerance: float) -> str:
    """Why a probe fails, or nothing."""
    if not outcome.same_prompt:
        return f"{outcome.probe}: the prompt has other token ids than in training"
    if outcome.pixel_difference > 1e-5:
        return f"{outcome.probe}: the image processor gives other pixels (by up to {outcome.pixel_difference:.2g})"
    if not outcome.relative <= tolerance:  # not `>`: a NaN is no parity either
        return f"{outcome.probe}: the logits differ by {outcome.relative:.2g} of their size; {tolerance:g} is allowed"
    if outcome.flips:
        return f"{outcome.probe}: {outcome.flips} greedy choices differ that were no near-ties"
    return ""


@contextmanager
def proved(out: Path, *, overwrite: bool, sources: Sequence[Path | str | None] = ()) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an error.

    After a `ParityError` it stays, so that one can see what was made; after any other error it goes. `sources` are what
    is read; `parity.json` names the first, what is converted, where it is a model folder of ours. Raises
    `CheckpointError` as `refuse_out` does, and where `out` cannot be written.
    """
    refuse_out(out, sources, overwrite=overwrite)
    place = out.resolve()
    temporary = place.with_name(f".{place.name}.unproved")
    try:
        with or_nothing(temporary, out, resumable=False):
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            if (report := read_report(temporary)) and sources and (Path(sources[0] or "") / MANIFEST).is_file():
                _write_json(report | {"source": str(sources[0])}, temporary)
            publish(temporary, place)
    except ParityError:
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def settle(report: Report, folder: Path, out: Path) -> None:
    """Write the numbers into the folder. Raises `ParityError` where they are beyond the tolerance."""
    write_report(report, folder)
    if not report.verified:
        raise ParityError(
            f"{out}: the result does not give what the model gives: {report.refusal}; it was not written. "
            f"What was made, and the numbers, are in {folder / PARITY}"
        )


def unverified(folder: Path, out: Path, reason: str, command: str) -> Report:
    """Say in the folder that becomes `out` that nothing was compared, why, and with which command to do it.

    For results whose back end is not installed here. `{out}` in the command is put in.
    """
    report = Report(False, "", 0.0, (), note=reason, command=command.format(out=out))
    write_report(report, folder)
    return report


def write_report(report: Report, folder: Path, source: Path | str | None = None) -> bool:
    """`parity.json`: the report, the versions it was made with, and what it was compared with, as before if not given.

    Numbers that are within the tolerance are not replaced by others that are not: returns whether it was written.
    """
    import transformers

    before = read_report(folder)
    if before.get("verified") is True and not report.verified:
        return False
    content = {"mmft": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    named = str(source) if source else before.get("source")
    _write_json(content | asdict(report) | ({"source": named} if named else {}), folder)
    return True


def read_report(folder: Path) -> dict[str, Any]:
    """What `parity.json` says; empty where there is none."""
    try:
        content = json.loads((folder / PARITY).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(content: dict[str, Any], folder: Path) -> None:
    (folder / PARITY).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")


def free() -> None:
    """Give back the memory of a model that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tolerance_for(dtype: torch.dtype, quantization: str) -> float:
    """What may differ, by the dtype of the result and the quantisation of the source."""
    return INT8_TOLERANCE if quantization == "int8" else TOLERANCE[dtype]


def summary(report: Report) -> dict[str, Any]:
    """The numbers a person wants: how many probes, how many with the same greedy answer, the largest difference."""
    return {
        "probes": len(report.outcomes),
        "same_answer": sum(outcome.same_answer for outcome in report.outcomes),
        "relative": max((outcome.relative for outcome in report.outcomes), default=0.0),
    }

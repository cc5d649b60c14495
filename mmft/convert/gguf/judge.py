"""The parity gate of GGUF files: what llama.cpp makes of them, beside what the trained model says.

Four bits move the logits further than most mistakes do, so quantised weights cannot show that tokenizer, chat template,
adapters and picture side are right. That is proved with the same parts in 16 or 32 bits, tightly; the quantised file
comes after, with numbers of its own that show what the rounding costs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmft.convert.gguf.file import PROVES, QUANTS, ROUNDED
from mmft.convert.gguf.run import LlamaCppResult
from mmft.convert.gguf.vision import CLS
from mmft.convert.parity import (
    MAX_NEW_TOKENS,
    TOLERANCE,
    Answer,
    LeftOut,
    Report,
    ask_source,
    compare,
    free,
    summary,
)
from mmft.convert.probes import PROBES, probes
from mmft.convert.results import OurResult, load_trained
from mmft.data.tokenize import Tokenizer
from mmft.errors import CheckpointError
from mmft.images import ImageTransform
from mmft.inference import PRECISIONS
from mmft.modeling.checkpoint import read_manifest
from mmft.plugins import Plugins
from mmft.types import Conversation

# Root mean square of two files' difference over that of the weights. Between the devices that one model's adapters are
# merged on it is 1e-3 at most; an adapter of a thousandth of the weights' size changes 1e-2 of them at 4 bits.
SAME_WEIGHTS = 5e-3


@dataclass(frozen=True)
class GgufReport(Report):
    """As `Report`; `dtype` is the type of the weights, `reference` that of the model it is compared with.

    `pictures` are the picture probes again, opened and resized by llama.cpp itself. They are told, not judged: two
    programs round a resized picture otherwise. The note says what differs beyond that. `proof` is the report of the
    same parts in `file.PROVES`' type; None where the type is that one, and `outcomes` are the proof.
    """

    reference: str = "fp32"
    pictures: tuple[dict[str, Any], ...] = ()
    proof: "GgufReport | None" = None


@dataclass(frozen=True)
class Wish:
    """What the user asked for."""

    quant: str = "f16"
    square_only: bool = False
    reference: str = "fp32"
    llm: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def tolerance(self) -> float:
        """What the weights' rounding may cost, and that of the reference where it is not float32."""
        own = TOLERANCE[PRECISIONS[self.reference]] if self.reference != "fp32" else 0.0
        return QUANTS[self.quant].tolerance + own

    @property
    def proof(self) -> "Wish | None":
        """The same in the type that proves its structure; None where this is one that does."""
        return replace(self, quant=PROVES[self.quant]) if self.quant in PROVES else None


@dataclass(frozen=True)
class Asked:
    """What the source said, and how its prompts and pixels are made."""

    answers: list[Answer | LeftOut]
    tokenizer: Tokenizer
    transform: ImageTransform | None

    @property
    def given(self) -> list[Answer]:
        """The probes that were asked."""
        return [answer for answer in self.answers if isinstance(answer, Answer)]


@contextmanager
def asked_source(folder: Path, plugins: Plugins, wish: Wish) -> Iterator[Asked]:
    """The answers of the model in `folder`, which is gone from memory then. The pictures are there within the block."""
    with probes(pictures=read_manifest(folder).model.vision is not None) as asked:
        source = load_trained(folder, plugins, device=wish.device, precision=wish.reference, llm=wish.llm)
        if wish.square_only:
            _make_square(asked)
        answers = ask_source(OurResult(source), asked)
        tokenizer, info = source.shape.tokenizer, source.shape.vision
        del source
        free()
        transform: Any = info.transform if info else None
        yield Asked(answers, tokenizer, transform)


def judge(folder: Path, place: Path, plugins: Plugins, wish: Wish, differs: Sequence[str]) -> GgufReport:
    """Ask the files in `place` what the model in `folder` was asked. What quantised files say proves no structure."""
    with asked_source(folder, plugins, wish) as asked:
        return judge_pair(asked, place, wish, differs)


def judge_pair(asked: Asked, place: Path, wish: Wish, differs: Sequence[str]) -> GgufReport:
    """As `judge`, with a source that has answered."""
    model, mmproj = find_pair(place)
    longest = max(len(answer.prompt) for answer in asked.given) + MAX_NEW_TOKENS
    with LlamaCppResult(model, mmproj, asked.tokenizer, asked.transform, longest=longest) as result:
        report = compare(asked.answers, result, asked.tokenizer, dtype=torch.float32, tolerance=wish.tolerance)
        result.own_pictures = True
        pictures = tuple(_own_picture(answer, result) for answer in asked.given if answer.pixels is not None)
    refusal = _refusal(report, mmproj, wish)
    known = {one.name: getattr(report, one.name) for one in fields(Report)}
    known |= {"verified": not refusal, "refusal": refusal, "note": _note(differs, pictures), "dtype": wish.quant}
    return GgufReport(**known, reference=wish.reference, pictures=pictures)


def with_proof(report: GgufReport, proof: GgufReport) -> GgufReport:
    """Both sets of numbers in one report, and the proof's in the note."""
    numbers = summary(proof)
    said = (
        f"proved in {proof.dtype} before {report.dtype} was written: {numbers['same_answer']} of {numbers['probes']} "
        f"same answers, logits differ by up to {numbers['relative']:.2g} ({proof.tolerance:g} is allowed)"
    )
    return replace(report, proof=proof, note="; ".join(filter(None, [said, report.note])))


def failed_proof(proof: GgufReport, wish: Wish) -> GgufReport:
    """The report of a result whose structure is wrong, whatever the type that was asked for."""
    return replace(proof, refusal=f"in {proof.dtype}, before {wish.quant} is written: {proof.refusal}")


def _refusal(report: Report, mmproj: Path | None, wish: Wish) -> str:
    """Why the pair fails, with what is known to be llama.cpp's own mistake; empty where it does not.

    Another choice of a word is no failure where weights have 8 bits or fewer: that is what rounding them does.
    """
    within = all(one.same_prompt and one.relative <= wish.tolerance for one in report.outcomes)
    if report.verified or (within and wish.quant not in ROUNDED):
        return ""
    names = [probe.name for probe in PROBES if probe.pictures]
    pictured = any(report.refusal.startswith(f"{name}:") for name in names)
    return f"{report.refusal}; {CLS}" if pictured and mmproj is not None and has_cls(mmproj) else report.refusal


def _note(differs: Sequence[str], pictures: Sequence[dict[str, Any]]) -> str:
    """What a person must know about pictures; nothing for a text model."""
    if not pictures:
        return ""
    same, most = sum(one["same_answer"] for one in pictures), max(one["relative"] for one in pictures)
    own = f"pictures resized by llama.cpp: {same} of {len(pictures)} same answers, logits differ by up to {most:.2g}"
    return "; ".join([own, *differs])


def has_cls(mmproj: Path) -> bool:
    """Whether the encoder has a CLS token."""
    from gguf import GGUFReader

    return any(tensor.name == "v.class_embd" for tensor in GGUFReader(mmproj).tensors)


def _make_square(asked: Sequence[tuple[str, Conversation]]) -> None:
    """Cut the probes' pictures to squares."""
    from PIL import Image

    for path in {image.source for _, conversation in asked for image in conversation.images}:
        picture = Image.open(path)
        side = min(picture.size)
        picture.crop((0, 0, side, side)).save(path)


def _own_picture(answer: Answer, result: LlamaCppResult) -> dict[str, Any]:
    """A picture probe with the file as llama.cpp's users give it."""
    theirs = result.logits(answer.conversation, answer.tokens)
    width = min(theirs.shape[1], answer.logits.shape[1])
    ours, theirs = answer.logits[:, :width], theirs[:, :width]
    size = float((ours - ours.mean(1, keepdim=True)).square().mean().sqrt())
    relative = float((theirs - ours).square().mean().sqrt()) / max(size, 1e-12)
    same = result.greedy(answer.conversation, MAX_NEW_TOKENS) == answer.tokens
    return {"probe": answer.name, "relative": relative, "same_answer": same}


def find_pair(place: Path) -> tuple[Path, Path | None]:
    """The files of a folder. Raises `CheckpointError` where it holds no such pair."""
    models, pictures = sorted(place.glob("model-*.gguf")), sorted(place.glob("mmproj-*.gguf"))
    if len(models) != 1 or len(pictures) > 1:
        raise CheckpointError(
            f"{place}: holds {len(models)} model-*.gguf files; one is expected, from `mmft convert gguf`"
        )
    return models[0], pictures[0] if pictures else None


def other_weights(place: Path, fresh: Path) -> str:
    """Which of the files in `place` does not hold the weights of its like in `fresh`, and where; empty for none."""
    (ours, our_sight), (theirs, their_sight) = find_pair(fresh), find_pair(place)
    if (our_sight is None) != (their_sight is None):
        return f"there is {'no' if their_sight is None else 'a'} mmproj-*.gguf, where the model gives the contrary"
    pairs = [(ours, theirs), *([(our_sight, their_sight)] if our_sight and their_sight else [])]
    found = ((other, _other_tensor(one, other)) for one, other in pairs)
    return next((f"{file.name}: {told}" for file, told in found if told), "")


def _other_tensor(ours: Path, theirs: Path) -> str:
    from gguf import GGUFReader

    mine = {tensor.name: tensor for tensor in GGUFReader(ours).tensors}
    yours = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    missing = sorted(mine.keys() ^ yours.keys())
    if missing:
        return f"tensor {missing[0]} is in one of the two only"
    for name, tensor in mine.items():
        other = yours[name]
        if tensor.tensor_type != other.tensor_type or tensor.data.shape != other.data.shape:
            return f"{name} has another type or shape"
        if np.array_equal(tensor.data, other.data):
            continue
        values = _values(tensor)
        difference = _size(_values(other) - values) / max(_size(values), 1e-12)
        if not difference <= SAME_WEIGHTS:
            return f"{name} has other weights than the model gives (they differ by {difference:.2g} of their size)"
    return ""


def _values(tensor: Any) -> NDArray[np.float32]:
    from gguf import quants

    result: NDArray[np.float32] = quants.dequantize(tensor.data, tensor.tensor_type)
    return result


def _size(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))

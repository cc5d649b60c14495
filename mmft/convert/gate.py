"""One conversion of a trained model, from the question to the proof: ask it, write it in its new form, ask that.

At no time are two models in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict, Unpack

import torch

from mmft.convert.parity import (
    Answer,
    LeftOut,
    Report,
    Result,
    ask_source,
    compare,
    free,
    proved,
    settle,
    tolerance_for,
)
from mmft.convert.parts import Parts, load_parts
from mmft.convert.probes import probes
from mmft.convert.results import OurResult, load_trained
from mmft.data.tokenize import Tokenizer
from mmft.inference import PRECISIONS
from mmft.modeling.checkpoint import read_manifest
from mmft.plugins import Plugins


class Options(TypedDict):
    """How a conversion is made; the same for all whose result is a folder of weights.

    `dtype` is that of the result, as in `runtime.precision`; None: as it was trained. `llm` is where the base model is
    now. `overwrite` replaces what an earlier conversion wrote.
    """

    device: torch.device
    dtype: NotRequired[str | None]
    max_shard_size: NotRequired[str]
    llm: NotRequired[str | None]
    overwrite: NotRequired[bool]


@dataclass(frozen=True)
class Asked:
    """What a trained model said, and what it is to be compared in. The probes' pictures are there within the block."""

    answers: Sequence[Answer | LeftOut]
    tokenizer: Tokenizer
    sees: bool
    precision: str
    tolerance: float
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """That of source and result."""
        return PRECISIONS[self.precision]

    def compare(self, result: Result, *, texts: bool = False) -> Report:
        """The report of a result, with `texts` on the probes without a picture alone."""
        answers = [answer for answer in self.answers if not (texts and answer.conversation.images)]
        return compare(answers, result, self.tokenizer, dtype=self.dtype, tolerance=self.tolerance)


@contextmanager
def asked_model(
    folder: Path, plugins: Plugins, *, precision: str, device: torch.device, llm: str | None = None
) -> Iterator[Asked]:
    """Ask the model folder `folder` the probes, in `precision`; then it is gone. Raises as `load_trained`."""
    model = read_manifest(folder).model
    with probes(pictures=model.vision is not None) as asked:
        source = load_trained(folder, plugins, device=device, precision=precision, llm=llm)
        tokenizer, answers = source.shape.tokenizer, ask_source(OurResult(source), asked)
        del source
        free()
        tolerance = tolerance_for(PRECISIONS[precision], model.llm.quantization)
        yield Asked(answers, tokenizer, model.vision is not None, precision, tolerance, device)


def convert(
    folder: Path,
    out: Path,
    plugins: Plugins,
    write: Callable[[Parts, Path, str], str],
    judge: Callable[[Asked, Path], Report],
    **options: Unpack[Options],
) -> Report:
    """Have `write` put the merged parts of `folder` into a folder, and `judge` compare that; it becomes `out`.

    `write` is given the largest size of a weight file too, and returns what a person must know to open the result.
    Raises `ParityError` where the result answers otherwise; `out` is then not written.
    """
    device, llm = options["device"], options.get("llm")
    precision = options.get("dtype") or read_manifest(folder).precision
    with (
        proved(out, overwrite=options.get("overwrite", False), sources=(folder, llm)) as place,
        asked_model(folder, plugins, precision=precision, device=device, llm=llm) as asked,
    ):
        parts = load_parts(folder, plugins, dtype=precision, device=device, llm=llm)
        note = write(parts, place, options.get("max_shard_size", "2GB"))
        del parts
        free()
        report = replace(judge(asked, place), note=note)
        settle(report, place, out)
    return report

"""`mmft convert verify`: the parity gate later, or again, for a result that is there already."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from mmft.convert.hf.classes import REMOTE_CODE
from mmft.convert.hf.llava import REMOTE_NOTE
from mmft.convert.parity import (
    PARITY,
    ParityError,
    Report,
    Result,
    ask_source,
    compare,
    free,
    probes,
    tolerance_for,
    write_report,
)
from mmft.convert.results import OurResult, TransformersResult, load_trained
from mmft.errors import CheckpointError
from mmft.inference import PRECISIONS, load_assistant
from mmft.modeling.checkpoint import MANIFEST, read_manifest
from mmft.plugins import Plugins

PROCESSOR = "preprocessor_config.json"


def verify(out: Path, folder: Path, plugins: Plugins, *, device: torch.device, llm: str | None = None) -> Report:
    """Ask `out` what the model folder `folder` is asked, and write the numbers to `parity.json` in `out`.

    `out` is a merged folder, one that transformers opens, or one with GGUF files. Raises `CheckpointError` for
    anything else, `ParityError` where it answers otherwise; the numbers are written then too.
    """
    if any(out.glob("*.gguf")):
        from mmft.convert.gguf.export import verify as verify_gguf

        return verify_gguf(out, folder, plugins, device=device, llm=llm)
    precision = _precision(out)
    manifest = read_manifest(folder)
    sees = manifest.model.vision is not None
    with probes(pictures=sees) as asked:
        source = load_trained(folder, plugins, device=device, precision=precision, llm=llm)
        tokenizer = source.shape.tokenizer
        answers = ask_source(OurResult(source), asked)
        del source
        free()
        dtype = PRECISIONS[precision]
        result: Result = (
            OurResult(load_assistant(out, plugins, device=device))
            if (out / MANIFEST).is_file()
            else TransformersResult(out, sees=(out / PROCESSOR).is_file(), dtype=dtype, device=device)
        )
        tolerance = tolerance_for(dtype, manifest.model.llm.quantization)
        report = compare(answers, result, tokenizer, dtype=dtype, tolerance=tolerance)
    report = replace(report, note=REMOTE_NOTE if (out / REMOTE_CODE).is_file() else "")
    write_report(report, out)
    if not report.verified:
        raise ParityError(f"{out} does not give what {folder} gives: {report.refusal}; see {out / PARITY}")
    return report


def _precision(out: Path) -> str:
    """Of the weights of a result, as its config says. Raises `CheckpointError` for what is no result of ours."""
    if (out / MANIFEST).is_file():
        return read_manifest(out).precision
    if not (out / "config.json").is_file():
        raise CheckpointError(f"{out} holds no config.json and no {MANIFEST}; give what `mmft convert` has written")
    written = json.loads((out / "config.json").read_text("utf-8"))
    names = {str(dtype).removeprefix("torch."): name for name, dtype in PRECISIONS.items()}
    return names.get(written.get("dtype") or written.get("torch_dtype") or "", "fp32")

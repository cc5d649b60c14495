"""`mmft convert verify`: the parity gate later, or again, for a result that is there already."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from mmft.convert.gate import asked_model
from mmft.convert.hf.classes import REMOTE_CODE
from mmft.convert.hf.llava import REMOTE_NOTE
from mmft.convert.parity import PARITY, ParityError, Report, Result, write_report
from mmft.convert.place import is_trained
from mmft.convert.results import OurResult, TransformersResult
from mmft.errors import CheckpointError, ModelError
from mmft.inference import PRECISIONS, load_assistant
from mmft.modeling.checkpoint import MANIFEST, read_manifest
from mmft.plugins import Plugins

PROCESSOR = "preprocessor_config.json"


def verify(out: Path, folder: Path, plugins: Plugins, *, device: torch.device, llm: str | None = None) -> Report:
    """Ask `out` what the model folder `folder` is asked, and write the numbers to `parity.json` in `out`.

    `out` is a merged folder, one that transformers opens, or one with GGUF files. Raises `CheckpointError` for
    anything else, `ParityError` where it answers otherwise; the numbers are written then too, but not over good ones.
    """
    if out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} is the model itself; give what `mmft convert` made of it, and then the model")
    if is_trained(out):
        raise CheckpointError(f"{out} is what training left; give what `mmft convert` has written")
    if any(out.glob("*.gguf")):
        from mmft.convert.gguf.export import verify as verify_gguf

        return verify_gguf(out, folder, plugins, device=device, llm=llm)
    precision = _precision(out)
    sees = read_manifest(folder).model.vision is not None
    if sees != _sees(out):
        one, other = (folder, out) if sees else (out, folder)
        raise CheckpointError(f"{one} sees pictures and {other} does not: {out} was not made of {folder}")
    with asked_model(folder, plugins, precision=precision, device=device, llm=llm) as asked:
        result: Result = (
            OurResult(load_assistant(out, plugins, device=device))
            if (out / MANIFEST).is_file()
            else _opened(out, sees=sees, dtype=asked.dtype, device=device)
        )
        report = asked.compare(result)
    report = replace(report, note=REMOTE_NOTE if (out / REMOTE_CODE).is_file() else "")
    written = write_report(report, out, folder)
    if not report.verified:
        where = f"see {out / PARITY}" if written else f"{out / PARITY}, of another comparison, was left as it is"
        raise ParityError(f"{out} does not give what {folder} gives: {report.refusal}; {where}")
    return report


def _sees(out: Path) -> bool:
    if (out / MANIFEST).is_file():
        return read_manifest(out, verify=False).model.vision is not None
    return (out / PROCESSOR).is_file()


def _opened(out: Path, *, sees: bool, dtype: torch.dtype, device: torch.device) -> TransformersResult:
    try:
        return TransformersResult(out, sees=sees, dtype=dtype, device=device)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{out}: cannot load: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _precision(out: Path) -> str:
    """Of the weights of a result, as its config says. Raises `CheckpointError` for what is no result of ours."""
    if (out / MANIFEST).is_file():
        return read_manifest(out).precision
    if not (out / "config.json").is_file():
        raise CheckpointError(f"{out} holds no config.json and no {MANIFEST}; give what `mmft convert` has written")
    try:
        written = dict(json.loads((out / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{out / 'config.json'} cannot be read: {error}") from error
    names = {str(dtype).removeprefix("torch."): name for name, dtype in PRECISIONS.items()}
    return names.get(written.get("dtype") or written.get("torch_dtype") or "", "fp32")

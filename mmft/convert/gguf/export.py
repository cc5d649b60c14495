"""`mmft convert gguf`: a trained model as GGUF files for llama.cpp, Ollama and what is built on them.

The folder holds the language model, the picture side (mmproj) where it sees, and Ollama's Modelfile. llama.cpp itself
is asked the probes of the parity gate; where it is not installed the result says that it is not verified.

For all types but f32 and f16 the same parts are written twice: first in 16 bits (bf16: 32), which proves that they are
the model (`judge`), then as asked for. The first pair lies beside OUT while it is asked, two bytes a weight (four), and
is gone before the second is written; so the disk needs room for the larger of the two, and the old OUT until then.
"""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mmft.convert.chat_jinja import jinja_of
from mmft.convert.gguf.chat import jinja_for_llama_cpp, modelfile
from mmft.convert.gguf.file import QUANTS, RangeError, find_quant, write_file
from mmft.convert.gguf.judge import (
    GgufReport,
    Wish,
    asked_source,
    failed_proof,
    find_pair,
    has_cls,
    judge_pair,
    other_weights,
    with_proof,
)
from mmft.convert.gguf.run import INSTALL, is_there
from mmft.convert.gguf.text import find_family, text_file, text_pieces
from mmft.convert.gguf.vision import CLS, NO_SQUARES, check_encoder, check_pictures, check_projector, vision_file
from mmft.convert.gguf.vocab import add_vocabulary, read_vocabulary
from mmft.convert.parity import PARITY, ParityError, Report, free, proved, read_report, settle, unverified, write_report
from mmft.convert.parts import Parts, load_parts
from mmft.data.records import is_unbound
from mmft.data.shape import describe_model
from mmft.errors import ModelError
from mmft.modeling.checkpoint import read_manifest
from mmft.plugins import Plugins

PROOF = "proof"  # the folder of the pair that is never published


def export(folder: Path, out: Path, plugins: Plugins, wish: Wish, *, overwrite: bool = False) -> Report:
    """Write the model folder `folder` as GGUF files into `out`, and ask llama.cpp what the model was asked.

    Raises `ModelError` for parts that llama.cpp has no graph or tokenizer for, `CheckpointError` where `out` cannot be
    written, `ParityError` where llama.cpp answers otherwise; then `out` is not written.
    """
    find_quant(wish.quant)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("writing GGUF needs the package gguf; pip install 'mmft[gguf]'")
    differs = check_before(folder, plugins, wish)
    with proved(out, overwrite=overwrite, sources=(folder, wish.llm)) as temporary:
        if not is_there():
            write_pair(folder, temporary, plugins, wish, differs)
            mmproj = find_pair(temporary)[1]
            if mmproj is not None and has_cls(mmproj):
                raise ModelError(f"{folder}: {CLS}; whether yours mends it is seen after: {INSTALL}")
            square = " --square-only" if wish.square_only else ""
            again = f"{INSTALL} && mmft convert gguf {folder} {{out}} --quant {wish.quant}{square} --overwrite"
            return unverified(temporary, out, "llama-cpp-python is not installed, so nothing was compared", again)
        report = _write_and_judge(folder, temporary, plugins, wish, differs)
        settle(report, temporary, out)
        return report


def _write_and_judge(
    folder: Path, place: Path, plugins: Plugins, wish: Wish, differs: Sequence[str], *, original: Path | None = None
) -> GgufReport:
    """Write the files into the empty folder `place` and judge them; where the type proves nothing, its proof first.

    After a failed proof `place` holds that alone, in the folder `PROOF`. With `original`, an earlier result, the files
    in `place` are what it must hold, and it is judged in their stead.
    """
    proof = None
    first = wish.proof
    if first is None:
        write_pair(folder, place, plugins, wish, differs)
    else:
        first = _write_proof(folder, place / PROOF, plugins, first, differs)
    free()
    with asked_source(folder, plugins, wish) as asked:
        if first is not None:
            proof = judge_pair(asked, place / PROOF, first, differs)
            if not proof.verified:
                return failed_proof(proof, wish)
            shutil.rmtree(place / PROOF)
            write_pair(folder, place, plugins, wish, differs)
            free()
        report = judge_pair(asked, original or place, wish, differs)
    if proof is None:
        return report
    report = with_proof(report, proof)
    told = other_weights(original, place) if original and report.verified else ""
    return replace(report, verified=False, refusal=told) if told else report


def _write_proof(folder: Path, place: Path, plugins: Plugins, wish: Wish, notes: Sequence[str]) -> Wish:
    """The pair that proves the structure, in 32 bits where weights are beyond the range of 16. Returns what it is."""
    place.mkdir()
    try:
        write_pair(folder, place, plugins, wish, notes)
    except RangeError:
        shutil.rmtree(place)
        place.mkdir()
        wish = replace(wish, quant="f32")
        write_pair(folder, place, plugins, wish, notes)
    return wish


def check_before(folder: Path, plugins: Plugins, wish: Wish) -> tuple[str, ...]:
    """What can be refused without reading a weight is; returns how llama.cpp's pictures differ from those of training.

    Raises `ModelError`.
    """
    model = read_manifest(folder).model
    if model.vision is None:
        return ()
    info = describe_model(model, plugins, folder).vision
    assert info is not None
    chosen = model.vision.projector
    with torch.device("meta"):
        check_projector(plugins.projectors.get(chosen.name).build(info.hidden_size, 8, **chosen.options), chosen.name)
    return check_pictures(info.transform, model.vision.encoder.name, square_only=wish.square_only)


def model_name(quant: str) -> str:
    """Of the language model's file."""
    return f"model-{quant}.gguf"


def mmproj_quant(quant: str) -> str:
    """The picture side is small and not quantised: half precision, or float32 where all is."""
    return quant if quant in ("f32", "bf16") else "f16"


def write_pair(folder: Path, place: Path, plugins: Plugins, wish: Wish, notes: Sequence[str]) -> None:
    """The files, unproved; `notes` go into the Modelfile. Raises `ModelError` where a part cannot be written."""
    parts = load_parts(folder, plugins, dtype="fp32", device=wish.device, llm=wish.llm)
    llm, tokenizer = parts.llm, parts.shape.tokenizer
    find_family(llm.config)
    if parts.vision is not None and parts.model.vision is not None:
        check_encoder(parts.vision, parts.model.vision.encoder.name)
    name = folder.resolve().parent.name if folder.name == "final" else folder.name
    jinja = None if is_unbound(parts.template) else jinja_for_llama_cpp(jinja_of(parts.template, tokenizer))
    rows = llm.get_input_embeddings().num_embeddings
    vocabulary = read_vocabulary(tokenizer.hf, rows, hidden=tokenizer.image_id)
    writer = text_file(llm.config, rows, name=name, file_type=QUANTS[wish.quant].file_type)
    add_vocabulary(writer, vocabulary, tokenizer.hf, parts.stop_ids, jinja)
    tied = bool(llm.config.tie_word_embeddings)
    head = "token_embd.weight" if tied else "output.weight"
    write_file(place / model_name(wish.quant), writer, text_pieces(llm), wish.quant, head=head)
    mmproj = _write_vision(parts, place, name, wish) if parts.vision is not None else None
    context = llm.config.max_position_embeddings
    content = modelfile(model_name(wish.quant), mmproj, parts.template if jinja else None, context, notes)
    (place / "Modelfile").write_text(content, "utf-8")


def _write_vision(parts: Parts, place: Path, name: str, wish: Wish) -> str:
    quant = mmproj_quant(wish.quant)
    writer, pieces = vision_file(parts, name=name, file_type=QUANTS[quant].file_type)
    file = f"mmproj-{quant}.gguf"
    write_file(place / file, writer, pieces, quant)
    return file


def verify(out: Path, folder: Path, plugins: Plugins, *, device: torch.device, llm: str | None = None) -> Report:
    """Compare what an earlier export left in `out` with the model it came from, and write `parity.json` anew.

    Quantised files are compared with those that the model gives now as well, tensor by tensor: these are written beside
    `out`, as by `export`, and thrown away.

    Raises `ModelError` where llama.cpp is not installed, `ParityError` where it answers otherwise.
    """
    if not is_there():
        raise ModelError(f"llama-cpp-python is not installed, so nothing can be compared; {INSTALL}")
    model, _ = find_pair(out)
    quant = model.stem.removeprefix("model-")
    find_quant(quant)
    differs = check_before(folder, plugins, Wish(quant, square_only=True))
    wish = Wish(quant, square_only=NO_SQUARES in " ".join(differs), llm=llm, device=device)
    if wish.proof is None:
        with asked_source(folder, plugins, wish) as asked:
            report = judge_pair(asked, out, wish, differs)
    else:
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as place:
            report = _write_and_judge(folder, Path(place), plugins, wish, differs, original=out)
    if wish.proof is not None and not read_report(out).get("proof"):
        (out / PARITY).unlink(missing_ok=True)  # of a version whose gate let everything through at few bits
    written = write_report(report, out, folder)
    if not report.verified:
        where = f"see {out / PARITY}" if written else f"{out / PARITY}, of another comparison, was left as it is"
        raise ParityError(f"{out} does not give what {folder} gives: {report.refusal}; {where}")
    return report

"""`mmft convert gguf`: a trained model as GGUF files for llama.cpp, Ollama and what is built on them.

The folder holds the language model, the picture side (mmproj) where it sees, and Ollama's Modelfile. llama.cpp itself
is asked the probes of the parity gate; where it is not installed the result says that it is not verified.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from mmft.convert.chat_jinja import jinja_of
from mmft.convert.gguf.chat import jinja_for_llama_cpp, modelfile
from mmft.convert.gguf.file import QUANTS, ROUNDED, find_quant, write_file
from mmft.convert.gguf.run import INSTALL, LlamaCppResult, is_there
from mmft.convert.gguf.text import find_family, text_file, text_pieces
from mmft.convert.gguf.vision import CLS, NO_SQUARES, check_encoder, check_pictures, check_projector, vision_file
from mmft.convert.gguf.vocab import add_vocabulary, read_vocabulary
from mmft.convert.parity import (
    MAX_NEW_TOKENS,
    PARITY,
    PROBES,
    TOLERANCE,
    Answer,
    ParityError,
    Report,
    ask_source,
    compare,
    free,
    probes,
    proved,
    settle,
    unverified,
    write_report,
)
from mmft.convert.parts import Parts, load_parts
from mmft.convert.results import OurResult, load_trained
from mmft.data.records import is_unbound
from mmft.data.shape import describe_model
from mmft.errors import CheckpointError, ModelError
from mmft.inference import PRECISIONS
from mmft.modeling.checkpoint import read_manifest
from mmft.plugins import Plugins
from mmft.types import Conversation


@dataclass(frozen=True)
class GgufReport(Report):
    """As `Report`; `dtype` is the type of the weights, `reference` that of the model it is compared with.

    `pictures` are the picture probes again, opened and resized by llama.cpp itself. They are told, not judged: two
    programs round a resized picture otherwise. The note says what differs beyond that.
    """

    reference: str = "fp32"
    pictures: tuple[dict[str, Any], ...] = ()


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


def export(folder: Path, out: Path, plugins: Plugins, wish: Wish, *, overwrite: bool = False) -> Report:
    """Write the model folder `folder` as GGUF files into `out`, and ask llama.cpp what the model was asked.

    Raises `ModelError` for parts that llama.cpp has no graph or tokenizer for, `ParityError` where it answers
    otherwise; then `out` is not written.
    """
    find_quant(wish.quant)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("writing GGUF needs the package gguf; pip install 'mmft[gguf]'")
    differs = check_before(folder, plugins, wish)
    with proved(out, overwrite=overwrite) as temporary:
        write_pair(folder, temporary, plugins, wish, differs)
        free()
        if not is_there():
            square = " --square-only" if wish.square_only else ""
            again = f"{INSTALL} && mmft convert gguf {folder} {{out}} --quant {wish.quant}{square} --overwrite"
            return unverified(temporary, out, "llama-cpp-python is not installed, so nothing was compared", again)
        report = judge(folder, temporary, plugins, wish, differs)
        settle(report, temporary, out)
        return report


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


def judge(folder: Path, place: Path, plugins: Plugins, wish: Wish, differs: Sequence[str]) -> GgufReport:
    """Ask the files in `place` what the model in `folder` was asked."""
    with probes(pictures=read_manifest(folder).model.vision is not None) as asked:
        source = load_trained(folder, plugins, device=wish.device, precision=wish.reference, llm=wish.llm)
        if wish.square_only:
            _make_square(asked)
        answers = ask_source(OurResult(source), asked)
        tokenizer, info = source.shape.tokenizer, source.shape.vision
        del source
        free()
        model, mmproj = find_pair(place)
        given = [answer for answer in answers if isinstance(answer, Answer)]
        longest = max(len(answer.prompt) for answer in given) + MAX_NEW_TOKENS
        transform: Any = info.transform if info else None
        with LlamaCppResult(model, mmproj, tokenizer, transform, longest=longest) as result:
            report = compare(answers, result, tokenizer, dtype=torch.float32, tolerance=wish.tolerance)
            result.own_pictures = True
            pictures = tuple(_own_picture(answer, result) for answer in given if answer.pixels is not None)
    refusal = _refusal(report, mmproj, wish)
    known = {one.name: getattr(report, one.name) for one in fields(Report)}
    known |= {"verified": not refusal, "refusal": refusal, "note": _note(differs, pictures), "dtype": wish.quant}
    return GgufReport(**known, reference=wish.reference, pictures=pictures)


def _refusal(report: Report, mmproj: Path | None, wish: Wish) -> str:
    """Why the pair fails, with what is known to be llama.cpp's own mistake; empty where it does not.

    Another choice of a word is no failure where weights have 8 bits or fewer: that is what rounding them does.
    """
    within = all(one.same_prompt and one.relative <= wish.tolerance for one in report.outcomes)
    if report.verified or (within and wish.quant not in ROUNDED):
        return ""
    names = [name for name, count, _ in PROBES if count]
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


def verify(out: Path, folder: Path, plugins: Plugins, *, device: torch.device, llm: str | None = None) -> Report:
    """Compare what an earlier export left in `out` with the model it came from, and write `parity.json` anew.

    Raises `ModelError` where llama.cpp is not installed, `ParityError` where it answers otherwise.
    """
    if not is_there():
        raise ModelError(f"llama-cpp-python is not installed, so nothing can be compared; {INSTALL}")
    model, _ = find_pair(out)
    quant = model.stem.removeprefix("model-")
    find_quant(quant)
    differs = check_before(folder, plugins, Wish(quant, square_only=True))
    wish = Wish(quant, square_only=NO_SQUARES in " ".join(differs), llm=llm, device=device)
    report = judge(folder, out, plugins, wish, differs)
    write_report(report, out)
    if not report.verified:
        raise ParityError(f"{out} does not give what {folder} gives: {report.refusal}; see {out / PARITY}")
    return report

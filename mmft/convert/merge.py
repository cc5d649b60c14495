"""`mmft convert merge`: adapters into the weights; the result is a model folder of ours, its llm/ a plain HF model.

The language model is merged layer by layer and written shard by shard, so memory peaks at the model and about one
shard. A model that was trained in 4 or 8 bit is merged onto its dequantised weights, in `dtype`.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import save_file

from mmft.config import Use
from mmft.convert.chat_jinja import Proved, jinja_of
from mmft.convert.gate import Asked, Options, convert
from mmft.convert.parity import Report, free
from mmft.convert.parts import Parts
from mmft.convert.results import OurResult, TransformersResult, load_trained
from mmft.errors import ModelError
from mmft.hub import named_from
from mmft.inference import PRECISIONS
from mmft.modeling.build import LLM_FOLDER, PROJECTOR, VISION_WEIGHTS
from mmft.modeling.checkpoint import MANIFEST, as_trained, file_hashes, read_manifest
from mmft.plugins import Plugins

NAMES = {dtype: name for name, dtype in PRECISIONS.items()}
TOKENIZER = "tokenizer"


def merge(folder: Path, out: Path, plugins: Plugins, **options: Unpack[Options]) -> Report:
    """Merge the model folder `folder` into `out`, and prove it: probes through both, in the same dtype.

    Raises `ParityError` where they differ; `out` is then not written.
    """

    plugins = as_trained(folder, read_manifest(folder, verify=False), plugins)  # said once, for folder and result

    def write(parts: Parts, place: Path, max_shard_size: str) -> str:
        _write(place, folder, parts, max_shard_size)
        return ""

    return convert(folder, out, plugins, write, partial(_judge, plugins=plugins), **options)


def _judge(asked: Asked, place: Path, *, plugins: Plugins) -> Report:
    """The folder as mmft opens it, and its llm/ alone on the texts, where that has a chat template."""
    report = asked.compare(OurResult(load_trained(place, plugins, device=asked.device, precision=asked.precision)))
    free()
    if not report.verified or not (place / LLM_FOLDER / "chat_template.jinja").is_file():
        return report
    alone = asked.compare(
        TransformersResult(place / LLM_FOLDER, sees=False, dtype=asked.dtype, device=asked.device), texts=True
    )
    return report if alone.verified else alone


def _write(temporary: Path, folder: Path, parts: Parts, max_shard_size: str) -> None:
    save_language_model(parts, temporary / LLM_FOLDER, max_shard_size)
    if (folder / TOKENIZER).is_dir():
        shutil.copytree(folder / TOKENIZER, temporary / TOKENIZER)
    else:
        parts.shape.tokenizer.hf.save_pretrained(temporary / TOKENIZER)
    vision = parts.model.vision
    if parts.projector is not None:
        save_file(_state(parts.projector), temporary / PROJECTOR)
    if parts.vision is not None and vision and (vision.lora or vision.trainable or (folder / VISION_WEIGHTS).is_file()):
        (temporary / VISION_WEIGHTS).parent.mkdir()
        save_file(_state(parts.vision), temporary / VISION_WEIGHTS)
    write_merged_manifest(temporary, folder, parts)


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def save_language_model(parts: Parts, folder: Path, max_shard_size: str) -> Proved | None:
    """A plain transformers folder: weights in shards, tokenizer with the proved chat template, stop tokens.

    Where no jinja gives the template's ids the tokenizer gets none, and None says so: a wrong one would be worse.
    """
    try:
        found = jinja_of(parts.template, parts.shape.tokenizer)
    except ModelError:
        found = None
    llm, hf = parts.llm, parts.shape.tokenizer.hf
    set_generation(llm, parts.stop_ids, hf.pad_token_id)
    llm.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(hf, folder, found)
    return found


def save_tokenizer(hf: Any, folder: Path, found: Proved | None) -> None:
    """The tokenizer's files with the proved template; the tokenizer itself keeps its own."""
    own = hf.chat_template
    try:
        hf.chat_template = found.jinja if found else None
        hf.save_pretrained(folder)
    finally:
        hf.chat_template = own


def set_generation(llm: Any, stop: Sequence[int], pad: int | None) -> None:
    """The tokens that end an answer; sampling settings of the base model stay, unless they contradict one another."""
    from transformers import GenerationConfig

    llm.config.name_or_path = ""  # a path on this machine tells nobody else anything
    config = llm.generation_config
    config.eos_token_id = list(stop) or None
    config.pad_token_id = pad if pad is not None else (stop[0] if stop else None)
    try:
        config.validate(strict=True)
    except ValueError:
        config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        llm.generation_config = config
    config.__dict__.pop("_from_model_config", None)  # transformers' own mark, which it would save


def write_merged_manifest(temporary: Path, folder: Path, parts: Parts) -> None:
    """`mmft.json` of a folder without adapters: as the source's, with what is no longer true taken out.

    Its language model lies in it, and so does an encoder that lies in the source; `merged` says what the former was.
    """
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    was = content["model"]
    llm = parts.model.llm.model_copy(
        update={
            "path": f"./{LLM_FOLDER}",
            "quantization": "none",
            "lora": None,
            "adapter": None,
            "trainable": False,
            "new_tokens": (),
            "revision": None,
        }
    )
    vision = parts.model.vision
    if vision is not None:
        vision = vision.model_copy(
            update={"lora": None, "adapter": None, "trainable": False, "projector_weights": None, "feature_cache": None}
        )
        encoder = was["vision"]["encoder"].get("path")
        if isinstance(encoder, str) and encoder.startswith("./") and (folder / encoder).is_dir():
            shutil.copytree(folder / encoder, temporary / encoder)
            vision = vision.model_copy(
                update={"encoder": Use(name=vision.encoder.name, options={**vision.encoder.options, "path": encoder})}
            )
    model = named_from(parts.model.model_copy(update={"llm": llm, "vision": vision}), temporary)
    content |= {"model": model.model_dump(mode="json"), "precision": NAMES[parts.dtype]}
    content["merged"] = {"llm": was["llm"]["path"], "quantization": was["llm"]["quantization"]}
    content |= {"files": file_hashes(temporary)}
    (temporary / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")

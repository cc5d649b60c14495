"""A whole model of others, taken apart: each weight to its part, the language model's file by file.

What is written are plain folders of transformers, so nothing of ours is needed to open them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.config import LLM, Model, Use, Vision, use
from mmft.convert.importing.files import State, read_tensors
from mmft.convert.importing.importers import TOKENIZER
from mmft.convert.importing.read import Found, read_projector
from mmft.convert.importing.weights import NO_WEIGHT, build_encoder, llm_state, outline
from mmft.errors import CheckpointError, ModelError
from mmft.hub import HUGGINGFACE, load_tokenizer
from mmft.modeling.build import LLM_FOLDER, PROJECTOR
from mmft.plugins import Plugins

VISION_FOLDER = "vision_encoder"
SHARDS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass
class Whole:
    """A model that says what it is. `encoder` is the folder or name its vision config and pictures' steps come from."""

    source: Path
    places: tuple[tuple[str, str, str], ...]
    text: Any  # transformers' config of the language model
    encoder: str
    select_layer: int
    pad_to_square: bool
    image_processor: Any
    vision_config: Any
    prefix_tokens: int | None = None  # that its class drops before the patches, where it says so
    lines: list[str] = field(default_factory=list)


def take_apart(whole: Whole, folder: Path, plugins: Plugins) -> tuple[Model, torch.dtype]:
    """Write the parts; returns the model of them, by their places in `folder`, and the dtype of its weights."""
    from safetensors.torch import save_file

    outlined = outline(whole.text)
    parts = _sort(whole, folder / LLM_FOLDER)
    llm = llm_state(parts["llm"], outlined, whole.source)
    if not parts["projector"]:
        raise CheckpointError(f"{whole.source} has no projector among its weights; is a file of it missing?")
    found = Found(projector=read_projector(parts["projector"], whole.source))
    dtype = next(tensor.dtype for tensor in llm.values() if tensor.is_floating_point())
    _finish_llm(whole, folder, outlined, dtype)
    save_file(found.projector, folder / PROJECTOR)
    path = whole.encoder
    if parts["vision"]:
        path = str(folder / VISION_FOLDER)
        _save_encoder(whole, folder / VISION_FOLDER, parts["vision"])
    kind = str(whole.vision_config.model_type)
    name = next((name for name in plugins.vision_encoders.names() if kind.startswith(name)), "vit")
    options = {"path": path, "select_layer": whole.select_layer, "pad_to_square": whole.pad_to_square}
    vision = Vision(encoder=use(name, **options), projector=Use(name=found.projector_name))
    _check_vision(vision, found.projector, outlined, whole, plugins)
    model = Model(llm=LLM(path=str(folder / LLM_FOLDER)), vision=vision)
    return model, dtype


def _check_vision(vision: Vision, projector: State, outlined: Any, whole: Whole, plugins: Plugins) -> None:
    """The encoder builds, gives what the projector takes, and drops what the model's class drops before the patches."""
    try:
        encoder = build_encoder(vision, HUGGINGFACE, plugins)
    except ModelError as error:
        raise CheckpointError(f"{whole.source}: {error}") from error
    prefix = getattr(encoder, "num_prefix_tokens", None)
    if whole.prefix_tokens is not None and prefix != whole.prefix_tokens:
        raise CheckpointError(
            f"{whole.source}: its class drops {whole.prefix_tokens} of the encoder's tokens, mmft the {prefix} that "
            "are no patches; such a model mmft has not"
        )
    weights = [tensor for key, tensor in sorted(projector.items()) if key.endswith("weight")]
    given = plugins.vision_encoders.get(vision.encoder.name).describe(**vision.encoder.options).hidden_size
    width = outlined.get_input_embeddings().weight.shape[1]
    if (weights[0].shape[1], weights[-1].shape[0]) != (given, width):
        raise CheckpointError(
            f"{whole.source}: its projector maps {weights[0].shape[1]} to {weights[-1].shape[0]} values; its encoder "
            f"gives {given} and its language model takes {width}"
        )


def _sort(whole: Whole, llm: Path) -> dict[str, State]:
    """Every weight by its part: the language model's go to disk, file by file, and come back without their numbers."""
    from safetensors.torch import save_file

    files = next(found for pattern in SHARDS if (found := sorted(whole.source.glob(pattern))))
    parts: dict[str, State] = {"llm": {}, "projector": {}, "vision": {}}
    written: list[tuple[Path, dict[str, Tensor]]] = []
    llm.mkdir()
    for path in files:
        shard: State = {}
        for key, tensor in read_tensors(path).items():
            part, name = _place(key, whole.places)
            if part != "llm":
                parts[part][name] = tensor.contiguous().clone()
            elif not name.endswith(NO_WEIGHT):
                shard[name] = tensor.contiguous().clone()
        if shard:
            temporary = llm / f"{len(written)}.safetensors"
            save_file(shard, temporary, metadata={"format": "pt"})
            written.append((temporary, {name: tensor.to("meta") for name, tensor in shard.items()}))
    _name_shards(llm, written)
    parts["llm"] = {name: tensor for _, shard in written for name, tensor in shard.items()}
    return parts


def _place(key: str, places: tuple[tuple[str, str, str], ...]) -> tuple[str, str]:
    """The part of a weight, and its name there."""
    for pattern, part, prefix in places:
        if match := re.match(pattern, key):
            return part, prefix + key[match.end() :]
    return "llm", key


def _name_shards(folder: Path, written: list[tuple[Path, dict[str, Tensor]]]) -> None:
    """The names transformers looks for, and the index where there is more than one file."""
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(written):
        final = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    size = sum(tensor.numel() * tensor.element_size() for _, names in written for tensor in names.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def _finish_llm(whole: Whole, folder: Path, outlined: Any, dtype: torch.dtype) -> None:
    """Config, generation settings and tokenizer of the language model; the tokenizer also as the model folder's own."""
    from transformers import GenerationConfig

    config = outlined.config
    config.architectures, config.dtype = [type(outlined).__name__], dtype
    config.save_pretrained(folder / LLM_FOLDER)
    if (whole.source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(whole.source).save_pretrained(folder / LLM_FOLDER)
    tokenizer = load_tokenizer(LLM(path=str(whole.source)))
    tokenizer.save_pretrained(folder / LLM_FOLDER)
    tokenizer.save_pretrained(folder / TOKENIZER)


def _save_encoder(whole: Whole, folder: Path, state: Mapping[str, Tensor]) -> None:
    """A plain vision model: its config, its weights, and what is done to a picture before, less the padding."""
    from safetensors.torch import save_file

    folder.mkdir()
    whole.vision_config.dtype = next(iter(state.values())).dtype
    whole.vision_config.save_pretrained(folder)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    whole.image_processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    steps = json.loads(path.read_text("utf-8"))
    if "do_pad" in steps:  # LLaVA's processor is CLIP's with padding, which here is the config's `pad_to_square`
        steps = {key: value for key, value in steps.items() if key != "do_pad"}
        path.write_text(json.dumps(steps | {"image_processor_type": "CLIPImageProcessor"}, indent=2), "utf-8")

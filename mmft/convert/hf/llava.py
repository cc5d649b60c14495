"""`mmft convert hf`: a trained model as transformers' own classes, for everything that opens those.

A model that sees becomes the class of `classes` that has a place for its parts, mostly LLaVA's, with a
`LlavaProcessor`; a text model a plain causal LM. Weights have the spelling of the hub's models, so that transformers 4,
vLLM and surgery scripts know them too.
"""

import inspect
import json
from pathlib import Path
from typing import Any, Protocol, Unpack, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmft.config import Model
from mmft.convert.chat_jinja import Proved, jinja_of
from mmft.convert.gate import Asked, Options, convert
from mmft.convert.hf.classes import REMOTE_CODE, Composed, Seeing, compose, remote_code
from mmft.convert.hf.processor import image_processor
from mmft.convert.hf.projector import read_projector
from mmft.convert.merge import save_language_model, set_generation
from mmft.convert.parity import Report
from mmft.convert.parts import Parts, check_logits
from mmft.convert.results import TransformersResult
from mmft.data.records import is_unbound
from mmft.data.shape import describe_model
from mmft.data.tokenize import IMAGE_TOKEN
from mmft.errors import ModelError
from mmft.modeling.checkpoint import read_manifest
from mmft.modeling.llm import make_room
from mmft.plugins import Plugins

REMOTE_NOTE = (
    "transformers has no class for this projector, so the code of one is in the folder: open model and processor with "
    "trust_remote_code=True"
)


@runtime_checkable
class TransformersEncoder(Protocol):
    """An encoder that is a hidden state of a transformers model, less the tokens before the patches."""

    model: Any
    layer: int
    num_prefix_tokens: int


def export(folder: Path, out: Path, plugins: Plugins, **options: Unpack[Options]) -> Report:
    """Write the model folder `folder` as transformers' classes into `out`, and prove it with plain transformers.

    Raises `ModelError` where there is no class for its parts, `ParityError` where the result answers otherwise.
    """
    model = read_manifest(folder).model
    if model.vision is not None:
        check_projector(model, plugins, folder)
    return convert(folder, out, plugins, _write, _judge, **options)


def _judge(asked: Asked, place: Path) -> Report:
    return asked.compare(TransformersResult(place, sees=asked.sees, dtype=asked.dtype, device=asked.device))


def _write(parts: Parts, folder: Path, max_shard_size: str) -> str:
    if parts.vision is not None:
        return _write_seeing(parts, folder, max_shard_size)
    if save_language_model(parts, folder, max_shard_size) is None and not is_unbound(parts.template):
        jinja_of(parts.template, parts.shape.tokenizer)  # says why
    return ""


def check_projector(model: Model, plugins: Plugins, folder: Path) -> None:
    """Raise `ModelError` for a projector that cannot be exported, before a weight is read."""
    assert model.vision is not None
    info = describe_model(model, plugins, folder).vision
    assert info is not None
    chosen = model.vision.projector
    with torch.device("meta"):
        read_projector(plugins.projectors.get(chosen.name).build(info.hidden_size, 8, **chosen.options), chosen.name)


def _write_seeing(parts: Parts, folder: Path, max_shard_size: str) -> str:
    """Write all files of a model that sees; returns what a person must know to open it."""
    assert parts.model.vision is not None and parts.shape.vision is not None and parts.projector is not None
    name = parts.model.vision.encoder.name
    encoder = _encoder(parts.vision, name)
    processor_of_images = image_processor(parts.shape.vision, name)
    tokenizer = parts.shape.tokenizer
    found = jinja_of(parts.template, tokenizer)
    _check_language_model(parts)
    image_id, size = tokenizer.image_id, parts.shape.vision.transform.output_size  # type: ignore[attr-defined]
    assert image_id is not None and size is not None
    if parts.llm.get_input_embeddings().num_embeddings <= image_id:
        # transformers looks the image token up before it puts the features there, so it needs a row. The mean of all
        # rows, in the head too: its logit is the mean of the others', which is never the largest.
        make_room(parts.llm, [image_id])
    layout = read_projector(parts.projector, parts.model.vision.projector.name)
    vision = fixed_size(encoder.model, size)
    composed = compose(Seeing(parts, vision, size, encoder.layer, encoder.num_prefix_tokens, layout, image_id))
    set_generation(composed.model, parts.stop_ids, tokenizer.hf.pad_token_id)
    composed.model.config.save_pretrained(folder)
    composed.model.generation_config.save_pretrained(folder)
    write_shards(composed.state, folder, max_shard_size)
    _save_processor(folder, processor_of_images, tokenizer.hf, found, composed, layout.scale)
    if not composed.is_remote:
        return ""
    (folder / REMOTE_CODE).write_bytes(remote_code())
    return REMOTE_NOTE


def _encoder(vision: nn.Module | None, name: str) -> TransformersEncoder:
    if not isinstance(vision, TransformersEncoder):
        raise ModelError(
            f"vision encoder {name!r} is no transformers model ({type(vision).__name__}), so transformers' LLaVA class "
            "has no place for it; use `mmft convert merge`"
        )
    return vision


def _check_language_model(parts: Parts) -> None:
    """Raise `ModelError` where the LLaVA class would compute other logits from the same weights."""
    llm = parts.llm
    head = llm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(
            f"{type(llm).__name__}: its output head has a bias, and transformers' LLaVA class has none; "
            "use `mmft convert merge`"
        )
    ids = torch.from_numpy(parts.shape.tokenizer.encode(["What is it? 1 2 3."])[0].astype("int64"))
    check_logits(llm, ids[None].to(head.weight.device))


def fixed_size(model: Any, size: tuple[int, int]) -> Any:
    """The encoder for pictures of `size` (height, width) and no other: its position table interpolated once, for good.

    transformers' LLaVA class never asks an encoder to interpolate. Models that do so unasked are returned as they are.
    """
    native = model.config.image_size
    native = tuple(native) if isinstance(native, list | tuple) else (native, native)
    if native == size or "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
        return model
    config = type(model.config).from_dict(model.config.to_dict() | {"image_size": size[0]})
    if size[0] != size[1]:
        raise ModelError(f"image_size: {size[0]} x {size[1]} pixels; transformers' LLaVA class takes square pictures")
    weight = next(model.parameters())
    with torch.device("meta"):
        other = type(model)(config)
    table = next(module for module in model.modules() if hasattr(module, "interpolate_pos_encoding"))
    state = model.state_dict()
    wrong = [key for key, tensor in other.state_dict().items() if tensor.shape != state[key].shape]
    assert len(wrong) == 1, wrong
    shape = other.state_dict()[wrong[0]].shape
    tokens = torch.zeros(1, shape[-2], shape[-1], device=weight.device, dtype=weight.dtype)
    state[wrong[0]] = table.interpolate_pos_encoding(tokens, *size).detach().reshape(shape)
    fitted = type(model)(config).to(weight.device, weight.dtype)
    fitted.load_state_dict(state)
    return fitted.eval().requires_grad_(False)


def write_shards(state: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
    """Safetensors files of at most that size, and their index where there is more than one."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        shard = {key: state[key].detach().cpu().contiguous() for key in keys}
        save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), "utf-8")


def _save_processor(folder: Path, images: Any, hf: Any, found: Proved, composed: Composed, scale: int) -> None:
    """Tokenizer, image processor and template, in the files of transformers 5 and in those of older readers."""
    from transformers import LlavaProcessor

    patch = composed.model.config.vision_config.patch_size
    own, side, options = hf.chat_template, hf.padding_side, hf.init_kwargs
    try:
        # The template is the processor's. Prompts are padded before, or what is generated follows padding; saved
        # is what stands in both places.
        hf.chat_template, hf.padding_side, hf.init_kwargs = None, "left", {**options, "padding_side": "left"}
        LlavaProcessor(
            image_processor=images,
            tokenizer=hf,
            patch_size=(patch if isinstance(patch, int) else patch[0]) * scale,  # pixels along a side of one token
            vision_feature_select_strategy=composed.strategy,
            chat_template=found.jinja,
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=composed.num_additional_tokens,
        ).save_pretrained(folder)
    finally:
        hf.chat_template, hf.padding_side, hf.init_kwargs = own, side, options
    images.save_pretrained(folder)  # preprocessor_config.json: transformers 4, older vLLM, SGLang, LMDeploy

"""`mmft convert hf`: a trained model as transformers' own classes, for everything that opens those.

A model that sees becomes a `LlavaForConditionalGeneration` with its `LlavaProcessor`, a text model a plain causal LM.
Weights have the spelling of the hub's llava-hf models, so that transformers 4, vLLM and surgery scripts know them too.
"""

import inspect
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmft.convert.chat_jinja import Proved, jinja_of
from mmft.convert.merge import save_language_model, set_generation
from mmft.convert.parity import Report, ask_source, compare, free, probes, proved, settle, tolerance_for
from mmft.convert.parts import Parts, base_class_is_kept, check_logits, load_parts
from mmft.convert.processor import image_processor
from mmft.convert.results import OurResult, TransformersResult
from mmft.data.tokenize import IMAGE_TOKEN
from mmft.errors import ModelError
from mmft.inference import PRECISIONS, load_assistant
from mmft.modeling.checkpoint import read_manifest
from mmft.modeling.llm import make_room
from mmft.plugins import Plugins

# Where the hub's checkpoints have a level that transformers' classes no longer have (or had only for a while).
HUB_LEVEL = {"clip_vision_model": "vision_model.", "siglip_vision_model": "vision_model."}


@runtime_checkable
class TransformersEncoder(Protocol):
    """An encoder that is a hidden state of a transformers model, less the tokens before the patches."""

    model: Any
    layer: int
    num_prefix_tokens: int


def export(
    folder: Path,
    out: Path,
    plugins: Plugins,
    *,
    dtype: str | None = None,
    device: torch.device,
    max_shard_size: str = "5GB",
    llm: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write the model folder `folder` as transformers' classes into `out`, and prove it with plain transformers.

    Raises `ModelError` where there is no class for its parts, `ParityError` where the result answers otherwise.
    """
    manifest = read_manifest(folder)
    precision = dtype or manifest.precision
    sees = manifest.model.vision is not None
    if manifest.model.vision is not None:
        check_projector(manifest.model.vision.projector.name)
    with proved(out, overwrite=overwrite) as temporary, probes(pictures=sees) as asked:
        source = load_assistant(folder, plugins, device=device, precision=precision, llm=llm)
        answers = ask_source(OurResult(source), asked)
        del source
        free()
        parts = load_parts(folder, plugins, dtype=precision, device=device, llm=llm)
        tokenizer = parts.shape.tokenizer
        if sees:
            _write_llava(parts, temporary, max_shard_size)
        elif save_language_model(parts, temporary, max_shard_size) is None:
            jinja_of(parts.template, tokenizer)  # says why
        del parts
        free()
        result = TransformersResult(temporary, sees=sees, dtype=PRECISIONS[precision], device=device)
        tolerance = tolerance_for(PRECISIONS[precision], manifest.model.llm.quantization)
        report = compare(answers, result, tokenizer, dtype=PRECISIONS[precision], tolerance=tolerance)
        settle(report, temporary, out)
    return report


def check_projector(name: str) -> None:
    """Raise `ModelError` for a projector that transformers' LLaVA class does not have."""
    if name.rpartition("/")[2] != "mlp2x_gelu":
        raise ModelError(
            f"projector {name!r}: transformers' LlavaForConditionalGeneration has exactly two linear layers with GELU "
            "between them; train with projector 'mlp2x_gelu' to export it, or use `mmft convert merge` and serve it "
            "with mmft"
        )


def _write_llava(parts: Parts, folder: Path, max_shard_size: str) -> None:
    assert parts.model.vision is not None and parts.shape.vision is not None and parts.projector is not None
    name = parts.model.vision.encoder.name
    encoder = _encoder(parts.vision, name)
    processor_of_images = image_processor(parts.shape.vision, name)
    tokenizer = parts.shape.tokenizer
    found = jinja_of(parts.template, tokenizer)
    _check_language_model(parts)
    image_id = tokenizer.image_id
    assert image_id is not None and parts.shape.vision.transform.output_size is not None  # type: ignore[attr-defined]
    architecture = type(parts.llm).__name__
    if parts.llm.get_input_embeddings().num_embeddings <= image_id:
        # transformers looks the image token up before it puts the features there, so it needs a row. The mean of all
        # rows, in the head too: its logit is the mean of the others', which is never the largest.
        make_room(parts.llm, [image_id])
    vision = fixed_size(encoder.model, parts.shape.vision.transform.output_size)  # type: ignore[attr-defined]
    model = _compose(parts, vision, encoder, architecture, image_id)
    set_generation(model, parts.stop_ids, tokenizer.hf.pad_token_id)
    _save_model(model, parts, folder, max_shard_size)
    strategy = model.config.vision_feature_select_strategy
    _save_processor(folder, processor_of_images, tokenizer.hf, found, vision.config, strategy, encoder)


def _encoder(vision: nn.Module | None, name: str) -> TransformersEncoder:
    if not isinstance(vision, TransformersEncoder):
        raise ModelError(
            f"vision encoder {name!r} is no transformers model ({type(vision).__name__}), so transformers' LLaVA class "
            "has no place for it; use `mmft convert merge`"
        )
    if vision.num_prefix_tokens > 1:
        raise ModelError(
            f"vision encoder {name!r} has {vision.num_prefix_tokens} tokens before its patches, with registers, and "
            "transformers' LLaVA class drops one at most; choose one without registers, or use `mmft convert merge`"
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


def _compose(parts: Parts, vision: Any, encoder: TransformersEncoder, architecture: str, image_id: int) -> Any:
    """The LLaVA model around the modules there are: nothing is copied."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    llm, projector = parts.llm, parts.projector
    assert projector is not None
    text_config, vision_config = llm.config, plain_vision_config(vision.config, parts.dtype)
    text_config.architectures = [architecture]  # vLLM and llama.cpp choose their class by it
    text_config.name_or_path = ""
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=parts.shape.tokenizer.tokens_per_image,
        # from the front, because blocks behind it were not built; transformers 5.23 takes 0 for "none given"
        vision_feature_layer=encoder.layer or -1 - vision_config.num_hidden_layers,
        vision_feature_select_strategy="default" if encoder.num_prefix_tokens else "full",
        projector_hidden_act="gelu",
        multimodal_projector_bias=projector[0].bias is not None,  # type: ignore[index]
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
        dtype=parts.dtype,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    if not base_class_is_kept(llm, model.model.language_model):
        raise ModelError(
            f"{type(llm).__name__}: from its config transformers composes another model, a "
            f"{type(model.model.language_model).__name__}; use `mmft convert merge`"
        )
    model.generation_config = llm.generation_config
    model.model.vision_tower = vision
    model.model.language_model = getattr(llm, llm.base_model_prefix)
    model.lm_head = llm.get_output_embeddings()
    places = model.model.multi_modal_projector
    places.linear_1, places.linear_2 = projector[0], projector[2]  # type: ignore[index]
    return model


def plain_vision_config(config: Any, dtype: torch.dtype) -> Any:
    """The encoder's config without what names blocks that were not built, and without the place it came from."""
    content = config.to_dict()
    for key in ("out_features", "out_indices", "stage_names", "_name_or_path"):
        content.pop(key, None)
    return type(config).from_dict(content | {"dtype": dtype})


def hub_names(model: Any) -> dict[str, Tensor]:
    """The weights under the names of the hub's llava-hf models; a tied head is left out."""
    tied = bool(model.config.tie_word_embeddings)
    level = HUB_LEVEL.get(model.config.vision_config.model_type, "")
    names = (
        ("model.vision_tower.", f"vision_tower.{level}"),
        ("model.language_model.", "language_model.model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    )
    state = {}
    for key, tensor in model.state_dict().items():
        if tied and key.startswith("lm_head."):
            continue
        ours, theirs = next(pair for pair in names if key.startswith(pair[0]))
        rest = key.removeprefix(ours)
        state[theirs.removesuffix(level) + rest if level and rest.startswith(level) else theirs + rest] = tensor
    return state


def _save_model(model: Any, parts: Parts, folder: Path, max_shard_size: str) -> None:
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_shards(hub_names(model), folder, max_shard_size)


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


def _save_processor(
    folder: Path, images: Any, hf: Any, found: Proved, vision: Any, strategy: str, encoder: TransformersEncoder
) -> None:
    """Tokenizer, image processor and template, in the files of transformers 5 and in those of older readers."""
    from transformers import LlavaProcessor

    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    own, side = hf.chat_template, hf.padding_side
    try:
        hf.chat_template, hf.padding_side = None, "left"  # the processor's counts; several prompts are padded before
        LlavaProcessor(
            image_processor=images,
            tokenizer=hf,
            patch_size=patch,
            vision_feature_select_strategy=strategy,
            chat_template=found.jinja,
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=encoder.num_prefix_tokens,
        ).save_pretrained(folder)
    finally:
        hf.chat_template, hf.padding_side = own, side
    images.save_pretrained(folder)  # preprocessor_config.json: transformers 4, older vLLM, SGLang, LMDeploy

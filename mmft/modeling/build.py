"""From the `model` part of a config to a model: the one builder behind training, resuming and chat.

The parts are loaded one by one, then joined, then checked: a rule that a later edit might break (nothing 4-bit outside
the language model, no adapter in a frozen part) is an assertion here, not a hope.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmft.config import Model, Vision
from mmft.config.check_methods import impossible_on_cpu
from mmft.config.picture import made_by, num_tokens
from mmft.errors import CheckpointError, ModelError
from mmft.hub import encoder_options
from mmft.modeling import attention
from mmft.modeling.llava import LlavaModel
from mmft.modeling.llm import base_token_ids, load_llm, quantized_layers
from mmft.modeling.lora import add_lora, is_adapted
from mmft.modeling.loss import piece_size
from mmft.modeling.picture_proof import built_part, prove, transformed
from mmft.modeling.tensors import misfits, refuse_misfits
from mmft.plugins import Plugins
from mmft.specs import VisionInfo

ADAPTER, LLM_FOLDER = "llm_adapter", "llm"
VISION_ADAPTER, VISION_WEIGHTS = "vision_adapter", "vision/model.safetensors"
PROJECTOR = "projector.safetensors"


def build_model(
    model: Model,
    plugins: Plugins,
    *,
    info: VisionInfo | None,
    image_id: int | None,
    dtype: torch.dtype,
    device: torch.device,
    weights: Path | None = None,
    gradient_checkpointing: bool = False,
) -> LlavaModel:
    """Load and join the parts. `weights` is a model folder (a checkpoint has one) whose trained parts are read instead
    of what the config starts from. Frozen parts are in `dtype`; trained ones in float32.
    """
    attention.register()
    if device.type == "cpu" and (reason := impossible_on_cpu(model.llm)):
        raise ModelError(reason)
    llm_folder = weights / LLM_FOLDER if weights and (weights / LLM_FOLDER).is_dir() else None
    llm = load_llm(model.llm, dtype=dtype, device=device, path=llm_folder, hub=model.hub)
    loss_piece = piece_size(llm)
    layout = attention.choose(llm, model.llm.attention)
    if model.llm.trainable:
        llm.requires_grad_(True)
    if gradient_checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model.llm.lora:
        start = _folder_in(weights, ADAPTER) if weights else model.llm.adapter
        rows = base_token_ids(model.llm, model.hub)
        llm = add_lora(llm, model.llm.lora, weights=start, causal_lm=True, new_tokens=rows, base=model.llm.path)
    width = llm.get_input_embeddings().weight.shape[1]
    parts: dict[str, Any] = {}
    if model.vision:
        assert info is not None
        parts = _build_vision(
            model.vision, plugins, info, width, dtype, device, weights,
            encoder_options(model.vision.encoder, plugins, model.hub),
        )  # fmt: skip
    built = LlavaModel(llm, image_id=image_id, dtype=dtype, layout=layout, **parts)  # type: ignore[arg-type]
    built.loss_piece = loss_piece
    if model.vision:
        built.made_by = _makers(model.vision, plugins)
    if gradient_checkpointing and built.vision_trains:
        checkpoint_gradients(built.vision)
    check_build(built, model)
    return built


def _build_vision(
    vision: Vision,
    plugins: Plugins,
    info: VisionInfo,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    weights: Path | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Encoder and projector, proved on one picture, with the shapes that a picture-less batch needs."""
    makers = _makers(vision, plugins)
    its_encoder = f"model.vision.encoder: {makers['vision']}"
    its_projector = f"model.vision.projector: {makers['projector']}"
    spec = plugins.vision_encoders.get(vision.encoder.name)
    encoder: Any = built_part(its_encoder, spec.build, **options)
    encoder.requires_grad_(False)
    if weights and (weights / VISION_WEIGHTS).is_file():
        load_exactly(encoder, weights / VISION_WEIGHTS)
    encoder.to(device, torch.float32 if vision.trainable else dtype)
    pixels = transformed(its_encoder, info)
    expected = (1, info.num_patches, info.hidden_size)
    why = f"describe says num_patches={info.num_patches} and hidden_size={info.hidden_size}; correct describe"
    features = prove(its_encoder, encoder, pixels[None].to(device), expected, why, dtype)
    pixel_shape = tuple(pixels.shape)
    unused = unused_parameters(encoder, pixel_shape) if vision.trainable or vision.lora else set()
    if vision.trainable:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name not in unused)
    if vision.lora:
        start = _folder_in(weights, VISION_ADAPTER) if weights else vision.adapter
        left_out = sorted({name.rpartition(".")[0] for name in unused})
        encoder = add_lora(encoder, vision.lora, weights=start, left_out=left_out)
    build = plugins.projectors.get(vision.projector.name).build
    projector: Any = built_part(its_projector, build, info.hidden_size, width, **vision.projector.options)
    projected = weights or vision.projector_weights
    if projected:
        load_exactly(projector, projected / PROJECTOR if projected.is_dir() else projected)
    projector.to(device, torch.float32).requires_grad_(vision.projector_trainable)
    tokens = num_tokens(vision, plugins, info)
    why = f"build was asked for {width} features, and num_tokens says {tokens}; correct num_tokens"
    prove(its_projector, projector, features, (1, tokens, width), why, dtype)
    return {
        "vision": encoder,
        "projector": projector,
        "feature_shape": (info.num_patches, info.hidden_size),
        "pixel_shape": pixel_shape,
    }


def _makers(vision: Vision, plugins: Plugins) -> dict[str, str]:
    """Part of the model -> the offer of a plugin that it is."""
    return {
        "vision": made_by(plugins.vision_encoders, vision.encoder.name),
        "projector": made_by(plugins.projectors, vision.projector.name),
    }


def unused_parameters(encoder: nn.Module, pixel_shape: tuple[int, ...]) -> set[str]:
    """Names of what no feature depends on: pooling heads, final norms, blocks behind the selected one.

    Such parameters never get a gradient: DDP waits for them, and an optimizer only carries them along. One black
    picture tells which they are, whatever plugin the encoder comes from. Leaves every parameter frozen.
    """
    named = {name: parameter for name, parameter in encoder.named_parameters() if parameter.is_floating_point()}
    encoder.eval().requires_grad_(True)  # in eval mode, so that no dropout draws from the random state
    first = next(iter(named.values()))
    with torch.enable_grad():
        features = encoder(torch.zeros(1, *pixel_shape, device=first.device, dtype=first.dtype))
        gradients = torch.autograd.grad(features.float().sum(), list(named.values()), allow_unused=True)
    encoder.requires_grad_(False)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


def checkpoint_gradients(encoder: Any) -> None:
    """Gradient checkpointing in an encoder that has it: transformers' models do, other modules may not."""
    from transformers import PreTrainedModel

    for module in encoder.modules():
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return


def _folder_in(weights: Path, name: str) -> Path:
    if not (weights / name).is_dir():
        raise CheckpointError(f"{weights} has no {name}: it belongs to another config")
    return weights / name


def load_exactly(module: nn.Module, path: Path) -> None:
    """Load a safetensors file; a missing, unexpected or misshapen tensor is an error that names it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    refuse_misfits(misfits(module.state_dict(), state), f"{path} does not fit this model")
    module.load_state_dict(state)


def check_build(built: LlavaModel, model: Model) -> None:
    """What must hold of every model, whatever built it."""
    for name, part in built.parts().items():
        quantized, adapted = len(quantized_layers(part)), is_adapted(part)
        if name != "llm" and quantized:
            raise AssertionError(f"{quantized} quantised layers in {name}; only the language model is quantised")
        config: Any = {"llm": model.llm, "vision": model.vision}.get(name)
        if adapted and not (config and config.lora):
            raise AssertionError(f"{name} carries an adapter that the config does not ask for")
        trains = any(p.requires_grad for p in part.parameters())
        wanted = bool(config and (config.trainable or config.lora))
        if name == "projector":
            wanted = bool(model.vision and model.vision.projector_trainable)
        if trains != wanted:
            raise AssertionError(f"{name} {'trains' if trains else 'does not train'}, the config says otherwise")
    if model.llm.quantization != "none" and not quantized_layers(built.llm):
        raise AssertionError(f"model.llm.quantization is {model.llm.quantization}, but no layer is quantised")


def module_table(built: LlavaModel, rates: dict[str, float]) -> list[tuple[str, ...]]:
    """part, parameters, trained, dtype, quantised layers, adapted layers, learning rate: a row for each part."""
    rows: list[tuple[str, ...]] = []
    for name, part in built.parts().items():
        parameters = list(part.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        adapted = sum(hasattr(module, "lora_A") for module in part.modules())
        rows.append(
            (
                name,
                f"{sum(_numel(p) for p in parameters):,}",
                f"{trained:,}",
                "/".join(_dtypes(parameters)),
                str(len(quantized_layers(part)) or "-"),
                str(adapted or "-"),
                f"{rates[name]:g}" if trained else "frozen",
            )
        )
    return rows


TABLE_COLUMNS: Sequence[str] = ("part", "parameters", "trained", "dtype", "quantised", "LoRA", "lr")


def _numel(parameter: Any) -> int:
    """A 4-bit parameter packs two values into a byte and remembers its shape."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def _dtypes(parameters: Sequence[Any]) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters})

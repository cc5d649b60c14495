"""A model of the right shapes that holds no weight: what `build_model` would build, from configurations alone.

Modules are made on the meta device and their parameters turned into torch's FakeTensors, which compute shapes and
dtypes, autocast and autograd included, and no numbers. Their storages say how large the real ones would be.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mmft.config import LLM, Lora, TrainConfig, Vision
from mmft.errors import ModelError
from mmft.hub import encoder_options, model_folder
from mmft.modeling import attention
from mmft.modeling.build import checkpoint_gradients
from mmft.modeling.llava import LlavaModel
from mmft.modeling.llm import base_token_ids, make_room
from mmft.modeling.lora import add_lora
from mmft.plugins import Plugins
from mmft.specs import VisionInfo

BLOCK_4BIT, BLOCK_NESTED = 64, 256  # bitsandbytes: weights that share a scale, and scales that share one in turn
TABLES_4BIT = 4 * (16 + 256 + 1)  # of each layer: the 16 values, those of the nested quantisation, its offset
Target = Literal["cpu", "cuda"]


class QuantizedLinear(nn.Linear):
    """Stands for a bitsandbytes layer: `weight` is what it dequantises to, `stored` the bytes it really keeps.

    As bitsandbytes 0.50 does it, forward and backward make the whole weight for a moment, and int8 keeps its input.
    """

    def __init__(self, linear: nn.Linear, kind: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = linear.bias
        self.stored = stored_bytes(kind, linear.out_features, linear.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in] -> float[..., out], in the dtype of the input."""
        keeps_input = self.kind == "int8"
        inside = x if keeps_input else x.to(self.weight.dtype)
        result: Tensor = _Dequantized.apply(inside, self.weight, keeps_input)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            result = result + self.bias
        return result.to(x.dtype)


class _Dequantized(torch.autograd.Function):
    """x @ weight.T with a weight that exists only while it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keeps_input: bool) -> Tensor:
        ctx.weight, ctx.kept = weight, x if keeps_input else None
        return x @ weight.to(x.dtype, copy=True).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.weight.to(grads[0].dtype, copy=True), None, None


class DropoutOfCuda(nn.Dropout):
    """Keeps a mask of one byte a value, as CUDA does; on a CPU torch keeps one in the dtype of the input."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Dropout`."""
        if not self.training or self.p == 0:
            return input
        kept: Tensor = torch.ops.aten.native_dropout(input, self.p, True)[0]
        return kept


class EncoderOutline(nn.Module):
    """A transformers vision model as our plugins use it: its patch features, none of the blocks behind them."""

    def __init__(self, model: Any, num_patches: int) -> None:
        super().__init__()
        self.model, self.num_patches = model, num_patches

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[N, 3, H, W] -> float[N, P, D]."""
        features: Tensor = self.model(pixel_values.to(self.model.dtype)).last_hidden_state
        return features[:, -self.num_patches :]


@dataclass(frozen=True)
class Skeleton:
    """The model, the mode its tensors belong to, and what could not be known (`notes`)."""

    model: LlavaModel
    mode: FakeTensorMode
    notes: tuple[str, ...] = ()

    def fake(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape that holds nothing."""
        return FakeTensor(self.mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))


def stored_bytes(kind: str, rows: int, columns: int) -> int:
    """What bitsandbytes keeps of a weight [rows, columns]: values, scales and tables (double quantisation in 4 bit)."""
    if kind == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // BLOCK_4BIT)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // BLOCK_NESTED) + TABLES_4BIT


def build_skeleton(
    config: TrainConfig, plugins: Plugins, *, info: VisionInfo | None, image_id: int | None, dtype: torch.dtype,
    target: Target, cast_trained: bool = False,
) -> Skeleton:  # fmt: skip
    """As `build_model`, without a weight; `cast_trained` puts trained weights into `dtype`, as engines do.

    Raises `ModelError` where the model's configuration cannot be read.
    """
    attention.register()
    notes: list[str] = []
    llm: Any = _llm(config.model.llm, config.model.hub, dtype)
    if config.model.llm.trainable:
        llm.requires_grad_(True)
    if config.runtime.gradient_checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.model.llm.lora:
        rows = base_token_ids(config.model.llm, config.model.hub)
        llm = _with_lora(llm, config.model.llm.lora, causal_lm=True, new_tokens=rows)
    parts: dict[str, Any] = {}
    if config.model.vision and info:
        width = llm.get_input_embeddings().weight.shape[1]
        encoder = _encoder(config.model.vision, config.model.hub, plugins, info, dtype, notes)
        with torch.device("meta"):
            projector = plugins.projectors.get(config.model.vision.projector.name).build(
                info.hidden_size, width, **config.model.vision.projector.options
            )
        projector.to(torch.float32).requires_grad_(config.model.vision.projector_trainable)
        pixel_shape = tuple(info.transform(PILImage.new("RGB", (64, 64))).shape)
        shapes = {"feature_shape": (info.num_patches, info.hidden_size), "pixel_shape": pixel_shape}
        parts = {"vision": encoder, "projector": projector, **shapes}
    model = LlavaModel(llm, image_id=image_id, dtype=dtype, **parts)
    if config.runtime.gradient_checkpointing and model.vision_trains:
        checkpoint_gradients(model.vision)
    if target == "cuda":
        _as_on_cuda(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(model, mode, dtype if cast_trained else None)
    return Skeleton(model, mode, tuple(notes))


def _llm(llm: LLM, hub: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    source = model_folder("model.llm.path", llm.path, hub, llm.revision)
    try:
        config = AutoConfig.from_pretrained(
            source, revision=llm.revision, trust_remote_code=llm.trust_remote_code
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32 if llm.trainable else dtype,
                trust_remote_code=llm.trust_remote_code,
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"model.llm.path: cannot read the config of {llm.path}: {str(error).splitlines()[0]}"
        ) from error
    if ids := base_token_ids(llm, hub):
        make_room(model, ids)
    model.requires_grad_(False)
    model.config.use_cache = False
    # flash attention saves the same; only an explicit `eager` keeps scores of length x length
    model.set_attn_implementation("eager" if llm.attention == "eager" else attention.VARLEN)
    if llm.quantization != "none":
        _quantize(model, llm.quantization, dtype)
    return model


def _quantize(model: Any, kind: str, dtype: torch.dtype) -> None:
    """Replace the layers transformers would replace: every linear one but the head and what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(name, skipped):
            model.set_submodule(name, QuantizedLinear(module, kind, dtype))


def _encoder(vision: Vision, hub: str, plugins: Plugins, info: VisionInfo, dtype: torch.dtype, notes: list[str]) -> Any:
    """The encoder from its transformers config, its last blocks cut as `select_layer` asks; None if it has none."""
    from transformers import AutoConfig, AutoModel

    spec, options = plugins.vision_encoders.get(vision.encoder.name), encoder_options(vision.encoder, plugins, hub)
    try:
        if spec.hub_option is None:
            raise ValueError("its plugin names no option that takes a folder saved by save_pretrained")
        config = AutoConfig.from_pretrained(str(options[spec.hub_option]))
        config = copy.deepcopy(getattr(config, "vision_config", config))
        layer = options.get("select_layer", _default(spec.build, "select_layer"))
        if layer is not None:
            config.num_hidden_layers = max(1, layer if layer >= 0 else config.num_hidden_layers + 1 + layer)
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32 if vision.trainable else dtype)
        if getattr(config, "hidden_size", None) != info.hidden_size:
            raise ValueError("its width is not that of the features")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        notes.append(f"the vision encoder {vision.encoder.name} is not counted, its config tells too little: {reason}")
        return None
    encoder: Any = EncoderOutline(model, info.num_patches).requires_grad_(vision.trainable)
    if vision.lora:
        encoder = _with_lora(encoder, vision.lora)
    return encoder


def _default(function: Any, name: str) -> Any:
    """The default of a plugin function's parameter, which may be wrapped."""
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _with_lora(part: Any, lora: Lora, **options: Any) -> Any:
    """An adapter on the meta device; what it starts from does not change its size, and PiSSA has nothing to split."""
    with torch.device("meta"):
        return add_lora(part, lora.model_copy(update={"init": "default"}), **options)


def _as_on_cuda(model: nn.Module) -> None:
    """Replace each dropout; peft keeps its own in module dicts, which are modules like others here."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Dropout:
                module._modules[name] = DropoutOfCuda(child.p)


def _make_fake(model: nn.Module, mode: FakeTensorMode, cast: torch.dtype | None = None) -> None:
    """Every parameter and buffer as a FakeTensor on the CPU, trained ones in `cast`; what was shared stays shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            dtype = cast if cast and tensor.requires_grad else tensor.dtype
            empty = torch.empty_like(tensor, device="meta", dtype=dtype).detach()
            new = FakeTensor(mode, empty, torch.device("cpu"))
            kept = nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            made[id(tensor)] = kept
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)

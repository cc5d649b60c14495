"""The classes of transformers that a model which sees becomes, composed around its modules: nothing is copied.

LLaVA's takes a projector of one or two linear layers, InternVL's one of pixel shuffle, LayerNorm and one or two linear
layers after a ViT of its kind. Whatever else is made of linear layers, GELU, LayerNorm and pixel shuffle gets
`modeling` written beside the weights. Idefics3 and SmolVLM have pixel shuffle and one linear layer too, but run a
final LayerNorm over the encoder's output, which is in no hidden state, and put tokens around a picture that were not
trained: nothing fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmft.convert.hf.projector import ProjectorLayout
from mmft.convert.parts import Parts, base_class_is_kept
from mmft.errors import ModelError

REMOTE_CODE = "modeling_mmft_llava.py"
# Where the hub's checkpoints have a level that transformers' classes no longer have (or had only for a while).
HUB_LEVEL = {"clip_vision_model": "vision_model.", "siglip_vision_model": "vision_model."}
# InternVL's ViT under the names of others that compute the same: a CLS token, norms before, a factor for each channel.
INTERNVL_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "internvl_vision": (),
    "vit": (("layers.", "encoder.layer."), (".attention.o_proj.", ".attention.projection_layer.")),
    "dinov2": (
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attention.o_proj.", ".attention.projection_layer."),
        (".layer_scale1.lambda1", ".lambda_1"),
        (".layer_scale2.lambda1", ".lambda_2"),
    ),
}
INTERNVL_SCALES = (1, 2, 4, 8)  # transformers divides by 1 / scale, which is exact for these
INTERNVL_EPS = 1e-5  # of the projector's LayerNorm, which has no field in its config
SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size",
    "num_channels",
)  # fmt: skip
LEFT_OUT = {"embeddings.mask_token", "layernorm.weight", "layernorm.bias", "pooler.dense.weight", "pooler.dense.bias"}


@dataclass(frozen=True)
class Seeing:
    """What a class is composed of. `vision` is the encoder's model for pictures of `size`, `layer` its hidden state."""

    parts: Parts
    vision: Any
    size: tuple[int, int]
    layer: int
    num_prefix_tokens: int
    layout: ProjectorLayout
    image_id: int

    @property
    def feature_layer(self) -> int:
        """From the front, because blocks behind it were not built; transformers 5.23 takes 0 for "none given"."""
        return self.layer or -1 - int(self.vision.config.num_hidden_layers)


@dataclass(frozen=True)
class Composed:
    """A model of transformers, its weights under the names they are saved with, and what its processor must count."""

    model: Any
    state: dict[str, Tensor]
    strategy: str
    num_additional_tokens: int
    is_remote: bool = False


def compose(seeing: Seeing) -> Composed:
    """The first class that has a place for every part; our own code where none has."""
    return _llava(seeing) or _internvl(seeing) or _remote(seeing)


def _llava(seeing: Seeing) -> Composed | None:
    from transformers import LlavaForConditionalGeneration

    layout, found = seeing.layout, _two_layers(seeing.layout.layers)
    if layout.scale > 1 or seeing.num_prefix_tokens > 1 or found is None or len(set(layout.biases())) != 1:
        return None
    (first, second), between = found
    config = _llava_config(seeing, projector_hidden_act=between, multimodal_projector_bias=layout.biases()[0])
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    places = model.model.multi_modal_projector
    places.linear_1, places.linear_2 = first, second
    _join(model, seeing, seeing.vision)
    return Composed(model, hub_names(model), config.vision_feature_select_strategy, seeing.num_prefix_tokens)


def _two_layers(layers: Sequence[nn.Module]) -> tuple[tuple[nn.Module, nn.Module], str] | None:
    """Two linear layers and what is between them: GELU, or nothing where the second one changes nothing."""
    kinds = tuple(type(layer) for layer in layers)
    if kinds == (nn.Linear,):
        return (layers[0], _identity(layers[0])), "linear"
    return ((layers[0], layers[2]), "gelu") if kinds == (nn.Linear, nn.GELU, nn.Linear) else None


def _identity(like: Any) -> nn.Linear:
    width = like.out_features
    layer = nn.Linear(width, width, bias=like.bias is not None, device=like.weight.device, dtype=like.weight.dtype)
    nn.init.eye_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer.requires_grad_(False)


def _internvl(seeing: Seeing) -> Composed | None:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    layout = seeing.layout
    found = _two_layers(layout.layers[1:])
    if layout.kinds[:1] != (nn.LayerNorm,) or found is None or not all(layout.biases()):
        return None
    norm: Any = layout.layers[0]
    if layout.scale not in INTERNVL_SCALES or norm.eps != INTERNVL_EPS or seeing.num_prefix_tokens != 1:
        return None
    (first, second), between = found
    vision = internvl_vit(seeing.vision, seeing.size)
    if vision is None:
        return None
    config = InternVLConfig(
        vision_config=plain_vision_config(vision.config, seeing.parts.dtype),
        text_config=_text_config(seeing.parts.llm),
        image_token_id=seeing.image_id,
        image_seq_length=seeing.parts.shape.tokenizer.tokens_per_image,
        downsample_ratio=1 / layout.scale,
        projector_hidden_act=between,
        vision_feature_layer=seeing.feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(seeing.parts.llm.config.tie_word_embeddings),
        dtype=seeing.parts.dtype,
    )
    config.architectures = ["InternVLForConditionalGeneration"]
    with torch.device("meta"):
        model: Any = InternVLForConditionalGeneration(config)
    places = model.model.multi_modal_projector
    places.layer_norm, places.linear_1, places.linear_2 = norm, first, second
    _join(model, seeing, vision)
    return Composed(model, hub_names(model), "default", 1)


@torch.no_grad()
def internvl_vit(model: Any, size: tuple[int, int]) -> Any | None:
    """A ViT as InternVL's class for it, for pictures of `size`; None where it computes something else."""
    from transformers import AutoModel, InternVLVisionConfig

    renamed = INTERNVL_NAMES.get(model.config.model_type)
    if not renamed:
        return model if renamed == () else None
    state = _under_names_of(model.state_dict(), renamed)
    table, first = state["embeddings.position_embeddings"], state.get("encoder.layer.0.mlp.fc1.weight")
    if first is None:  # a gated MLP
        return None
    patches = (size[0] // _side(model.config.patch_size)) * (size[1] // _side(model.config.patch_size))
    tokens = torch.zeros(1, patches + 1, table.shape[-1], device=table.device, dtype=table.dtype)
    state["embeddings.position_embeddings"] = model.embeddings.interpolate_pos_encoding(tokens, *size)
    for block in range(model.config.num_hidden_layers):
        for factor in ("lambda_1", "lambda_2"):
            state.setdefault(f"encoder.layer.{block}.{factor}", torch.ones_like(table[0, 0]))
    config = InternVLVisionConfig(
        **{key: getattr(model.config, key) for key in SHARED},
        image_size=list(size),
        attention_bias="encoder.layer.0.attention.q_proj.bias" in state,
        intermediate_size=first.shape[0],
    )
    fitted = AutoModel.from_config(config).to(table.device, table.dtype)
    wanted = fitted.state_dict().keys()
    if not wanted <= state.keys() or not state.keys() - wanted <= LEFT_OUT:
        return None
    fitted.load_state_dict({key: state[key] for key in wanted})
    return fitted.eval().requires_grad_(False)


def _under_names_of(state: Mapping[str, Tensor], renamed: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    found = {}
    for key, tensor in state.items():
        for old, new in renamed:
            key = key.replace(old, new)
        found[key] = tensor
    return found


def _side(patch_size: Any) -> int:
    return int(patch_size if isinstance(patch_size, int) else patch_size[0])


def _remote(seeing: Seeing) -> Composed:
    from mmft.convert.hf.modeling import MmftLlavaConfig, MmftLlavaForConditionalGeneration

    layout = seeing.layout
    config = _llava_config(
        seeing,
        kind=MmftLlavaConfig,
        vision_feature_select_strategy="full",  # the code leaves out the tokens before the patches itself
        projector_layers=layout.specs(),
        projector_scale=layout.scale,
        num_prefix_tokens=seeing.num_prefix_tokens,
    )
    module, name = REMOTE_CODE.removesuffix(".py"), MmftLlavaForConditionalGeneration.__name__
    config.architectures = [name]
    config.auto_map = {
        "AutoConfig": f"{module}.{MmftLlavaConfig.__name__}",
        "AutoModelForImageTextToText": f"{module}.{name}",
    }
    with torch.device("meta"):
        model: Any = MmftLlavaForConditionalGeneration(config)
    model.model.multi_modal_projector.layers = nn.Sequential(*layout.layers)
    _join(model, seeing, seeing.vision)
    tied = bool(config.tie_word_embeddings)
    state = {key: tensor for key, tensor in model.state_dict().items() if not (tied and key.startswith("lm_head."))}
    return Composed(model, state, "full", 0, is_remote=True)


def remote_code() -> bytes:
    """The text of the module that is written beside weights no class of transformers has a place for."""
    return (Path(__file__).parent / "modeling.py").read_bytes()


def _llava_config(seeing: Seeing, *, kind: Any = None, **options: Any) -> Any:
    from transformers import LlavaConfig

    parts = seeing.parts
    chosen = {
        "vision_config": plain_vision_config(seeing.vision.config, parts.dtype),
        "text_config": _text_config(parts.llm),
        "image_token_index": seeing.image_id,
        "image_seq_length": parts.shape.tokenizer.tokens_per_image,
        "vision_feature_layer": seeing.feature_layer,
        "vision_feature_select_strategy": "default" if seeing.num_prefix_tokens else "full",
        "tie_word_embeddings": bool(parts.llm.config.tie_word_embeddings),
        "dtype": parts.dtype,
    }
    return (kind or LlavaConfig)(**(chosen | options))


def _text_config(llm: Any) -> Any:
    llm.config.architectures = [type(llm).__name__]  # vLLM and llama.cpp choose their class by it
    llm.config.name_or_path = ""  # a path on this machine tells nobody else anything
    return llm.config


def _join(model: Any, seeing: Seeing, vision: Any) -> None:
    """Put encoder, language model and head into their places. Raises `ModelError` where the class has another model."""
    llm = seeing.parts.llm
    if not base_class_is_kept(llm, model.model.language_model):
        raise ModelError(
            f"{type(llm).__name__}: from its config transformers composes another model, a "
            f"{type(model.model.language_model).__name__}; use `mmft convert merge`"
        )
    model.generation_config = llm.generation_config
    model.model.vision_tower = vision
    model.model.language_model = getattr(llm, llm.base_model_prefix)
    model.lm_head = llm.get_output_embeddings()


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

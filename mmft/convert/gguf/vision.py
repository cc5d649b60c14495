"""The picture side of a GGUF pair (mmproj): a ViT and its projector under the names of llama.cpp's `clip.cpp`.

Its graph for the projector type "mlp" (tools/mtmd/models/llava.cpp) is a ViT of LayerNorms, with or without CLS token
and first norm, some layer's states, and two linear layers with GELU between: CLIP, SigLIP, ViT, and DINOv2 once the
factors of its layer scales are multiplied into the matrices before them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmft.convert.gguf.file import Piece
from mmft.convert.gguf.text import find_family
from mmft.convert.hf.llava import TransformersEncoder, fixed_size
from mmft.convert.parts import Parts
from mmft.errors import ModelError
from mmft.images import ImageTransform

NO_SQUARES = "pictures that are no squares"
BICUBIC = 3  # of Pillow's filters
CLS = (
    "llama.cpp mistakes the CLS token's place in such encoders (its issue 25814, not mended in 0.5.0), so each patch "
    "gets its neighbour's position; choose an encoder without CLS, as SigLIP, or a llama.cpp where that is mended"
)
PAD_COLOR = (122, 116, 104)  # what llama.cpp pads pictures with: CLIP's mean colour
CLIP_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.": "v.patch_embd.",
    "embeddings.position_embedding.": "v.position_embd.",
    "pre_layrnorm.": "v.pre_ln.",
    "encoder.layers.{}.self_attn.q_proj.": "v.blk.{}.attn_q.",
    "encoder.layers.{}.self_attn.k_proj.": "v.blk.{}.attn_k.",
    "encoder.layers.{}.self_attn.v_proj.": "v.blk.{}.attn_v.",
    "encoder.layers.{}.self_attn.out_proj.": "v.blk.{}.attn_out.",
    "encoder.layers.{}.layer_norm1.": "v.blk.{}.ln1.",
    "encoder.layers.{}.layer_norm2.": "v.blk.{}.ln2.",
    "encoder.layers.{}.mlp.fc1.": "v.blk.{}.ffn_up.",
    "encoder.layers.{}.mlp.fc2.": "v.blk.{}.ffn_down.",
}
VIT_START = {
    "embeddings.cls_token": "v.class_embd",
    "embeddings.patch_embeddings.projection.": "v.patch_embd.",
    "embeddings.position_embeddings": "v.position_embd.weight",
}
VIT_NAMES = VIT_START | {
    "layers.{}.attention.q_proj.": "v.blk.{}.attn_q.",
    "layers.{}.attention.k_proj.": "v.blk.{}.attn_k.",
    "layers.{}.attention.v_proj.": "v.blk.{}.attn_v.",
    "layers.{}.attention.o_proj.": "v.blk.{}.attn_out.",
    "layers.{}.layernorm_before.": "v.blk.{}.ln1.",
    "layers.{}.layernorm_after.": "v.blk.{}.ln2.",
    "layers.{}.mlp.fc1.": "v.blk.{}.ffn_up.",
    "layers.{}.mlp.fc2.": "v.blk.{}.ffn_down.",
}
DINO_NAMES = VIT_START | {
    "encoder.layer.{}.attention.q_proj.": "v.blk.{}.attn_q.",
    "encoder.layer.{}.attention.k_proj.": "v.blk.{}.attn_k.",
    "encoder.layer.{}.attention.v_proj.": "v.blk.{}.attn_v.",
    "encoder.layer.{}.attention.o_proj.": "v.blk.{}.attn_out.",
    "encoder.layer.{}.norm1.": "v.blk.{}.ln1.",
    "encoder.layer.{}.norm2.": "v.blk.{}.ln2.",
    "encoder.layer.{}.mlp.fc1.": "v.blk.{}.ffn_up.",
    "encoder.layer.{}.mlp.fc2.": "v.blk.{}.ffn_down.",
    "encoder.layer.{}.layer_scale1.lambda1": "v.blk.{}.ls1",
    "encoder.layer.{}.layer_scale2.lambda1": "v.blk.{}.ls2",
}
ENCODERS = {
    "clip_vision_model": CLIP_NAMES,
    "siglip_vision_model": CLIP_NAMES,
    "dinov2": DINO_NAMES,
    "vit": VIT_NAMES,
}
# behind the layer that is read: final norms and pooling heads
BEHIND = ("post_layernorm.", "head.", "layernorm.", "pooler.", "embeddings.mask_token", "embeddings.position_ids")
GELU = {"gelu": True, "gelu_pytorch_tanh": True, "gelu_new": True, "quick_gelu": False}


def check_projector(projector: nn.Module, name: str) -> None:
    """Raise `ModelError` for a projector that llama.cpp's graph is not made of."""
    layers = list(projector) if isinstance(projector, nn.Sequential) else []
    if [type(layer) for layer in layers] != [nn.Linear, nn.GELU, nn.Linear]:
        raise ModelError(
            f"projector {name!r}: llama.cpp's LLaVA graph has exactly two linear layers with GELU between them; train "
            "with projector 'mlp2x_gelu' to write GGUF, or use `mmft convert merge` and serve it with mmft"
        )


def check_pictures(transform: Any, name: str, *, square_only: bool) -> tuple[str, ...]:
    """What llama.cpp does to pictures otherwise: it always lays them on a square, and resizes by bicubic filters.

    Raises `ModelError` where pictures that are no squares would be seen otherwise than in training, unless
    `square_only` says that there will be none.
    """
    if not isinstance(transform, ImageTransform) or transform.output_size is None:
        raise ModelError(
            f"vision encoder {name!r}: its transform ({type(transform).__name__}) is its own, which llama.cpp has not"
        )
    height, width = transform.output_size
    if height != width:
        raise ModelError(f"vision encoder {name!r}: pictures of {width} x {height}; llama.cpp's are squares")
    found = []
    if not transform.pad_to_square:
        how = "stretches" if isinstance(transform.resize, tuple) else "crops"
        found.append(f"training {how} {NO_SQUARES}, llama.cpp pads them")
        if not square_only:
            raise ModelError(
                f"vision encoder {name!r}: {found[0]}, so it would see other pictures; train with pad_to_square=True, "
                "or give --square-only and show it squares"
            )
    colour = tuple(int(255 * value) for value in transform.mean)
    if transform.pad_to_square and colour != PAD_COLOR:
        found.append(f"training pads pictures with the colour {colour}, llama.cpp with {PAD_COLOR}")
    if transform.resample != BICUBIC:
        found.append("training resizes pictures by another filter than llama.cpp, which has the bicubic one")
    return tuple(found)


def vision_file(parts: Parts, *, name: str, file_type: str) -> tuple[Any, list[Piece]]:
    """A `gguf.GGUFWriter` with the keys of encoder and projector, and the tensors.

    Raises `ModelError` for an encoder or projector that has no graph in llama.cpp.
    """
    import gguf

    assert parts.model.vision is not None and parts.shape.vision is not None and parts.projector is not None
    encoder_name = parts.model.vision.encoder.name
    check_projector(parts.projector, parts.model.vision.projector.name)
    encoder = check_encoder(parts.vision, encoder_name)
    transform = parts.shape.vision.transform
    assert isinstance(transform, ImageTransform) and transform.output_size is not None
    model = fixed_size(encoder.model, transform.output_size)
    config = model.config
    writer = gguf.GGUFWriter(None, "clip")
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(GELU[config.hidden_act])
    writer.add_vision_image_size(transform.output_size[0])
    writer.add_vision_patch_size(_patch(config))
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_block_count(encoder.layer)
    writer.add_array("clip.vision.feature_layer", [encoder.layer])
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(list(transform.mean))
    writer.add_vision_image_std([std / (255 * transform.scale) for std in transform.std])
    tensors = encoder_tensors(model.state_dict(), ENCODERS[config.model_type], encoder.layer)
    projector = dict(parts.projector.state_dict())
    writer.add_vision_projection_dim(int(projector["2.weight"].shape[0]))
    writer.add_vision_feed_forward_length(_inner(tensors, config))
    if find_family(parts.llm.config).scaled:
        shrink = projector["2.weight"].shape[0] ** -0.5
        projector |= {key: value * shrink for key, value in projector.items() if key.startswith("2.")}
    for layer in ("0", "2"):
        weight = tensors[f"mm.{layer}.weight"] = projector[f"{layer}.weight"]
        tensors[f"mm.{layer}.bias"] = projector.get(f"{layer}.bias", weight.new_zeros(weight.shape[0]))  # it adds one
    return writer, [Piece.of(key, tensor, always_float=_is_float(key)) for key, tensor in tensors.items()]


def _inner(tensors: Mapping[str, Tensor], config: Any) -> int:
    found = tensors.get("v.blk.0.ffn_up.weight")
    return int(found.shape[0]) if found is not None else int(config.hidden_size * 4)


def _is_float(name: str) -> bool:
    return name.startswith(("v.patch_embd", "v.position_embd", "v.class_embd"))


def _patch(config: Any) -> int:
    patch = config.patch_size
    if not isinstance(patch, int):
        if patch[0] != patch[1]:
            raise ModelError(f"GGUF: patches of {patch[0]} x {patch[1]}; llama.cpp's are squares")
        patch = patch[0]
    return int(patch)


def check_encoder(vision: Any, name: str) -> TransformersEncoder:
    """The encoder, as one of transformers. Raises `ModelError` where llama.cpp has no graph for it."""
    if not isinstance(vision, TransformersEncoder):
        raise ModelError(f"vision encoder {name!r} is no transformers model ({type(vision).__name__}): no GGUF of it")
    config = vision.model.config
    problems = []
    if config.model_type not in ENCODERS:
        problems.append(f"of the type {config.model_type!r}; {', '.join(ENCODERS)} have a graph")
    elif config.hidden_act not in GELU:
        problems.append(f"with the activation {config.hidden_act!r}; {', '.join(GELU)} are known")
    if vision.num_prefix_tokens > 1:
        problems.append("with register tokens, which llama.cpp's graph has no place for")
    if getattr(config, "use_swiglu_ffn", False):
        problems.append("with gated feed-forward layers, which llama.cpp's graph has not")
    if vision.layer == 0:
        problems.append("read before its first block (select_layer=0), where llama.cpp reads a block's output")
    if problems:
        raise ModelError(f"vision encoder {name!r} is one {'; '.join(problems)}; train with a CLIP encoder, say")
    return vision


def encoder_tensors(state: Mapping[str, Tensor], names: Mapping[str, str], layers: int) -> dict[str, Tensor]:
    """The tensors of the first `layers` blocks under llama.cpp's names, layer scales multiplied in.

    Raises `ModelError` for a weight that has no place.
    """
    rules = [(re.compile("^" + re.escape(old).replace(r"\{\}", r"(\d+)")), new) for old, new in names.items()]
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("vision_model.")
        if name.startswith(BEHIND):
            continue
        new = _renamed(name, rules, layers)
        if new is None:
            raise ModelError(f"GGUF: the vision encoder has a weight {name!r} that llama.cpp's graph has not")
        if new:
            found[new] = tensor
    found["v.position_embd.weight"] = found["v.position_embd.weight"].flatten(0, -2)
    if "v.class_embd" in found:
        found["v.class_embd"] = found["v.class_embd"].flatten()
    for scale, matrix in (("ls1", "attn_out"), ("ls2", "ffn_down")):
        _multiply_in(found, scale, matrix)
    return found


def _renamed(name: str, rules: Sequence[tuple[re.Pattern[str], str]], layers: int) -> str | None:
    """llama.cpp's name; empty for a block that is not read, None for what has no place."""
    for pattern, new in rules:
        match = pattern.match(name)
        if match:
            if match.groups() and int(match[1]) >= layers:
                return ""
            return (new.format(*match.groups()) if match.groups() else new) + name[match.end() :]
    return None


def _multiply_in(tensors: dict[str, Tensor], scale: str, matrix: str) -> None:
    """`scale * (W x + b)` as `(scale W) x + scale b`."""
    for name in [name for name in tensors if name.endswith(f".{scale}")]:
        factor = tensors.pop(name).float()
        block = name.removesuffix(scale)
        tensors[f"{block}{matrix}.weight"] = tensors[f"{block}{matrix}.weight"].float() * factor[:, None]
        tensors[f"{block}{matrix}.bias"] = tensors[f"{block}{matrix}.bias"].float() * factor

"""LLaVA: its data maps, the CLIP encoder with its defaults, and the projectors.

Data maps are in `_llava_maps`, torch code in `_projector` and `_hf_vision`.
"""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmft import DataMap, ProjectorSpec, VisionEncoderSpec, VisionInfo, hookimpl
from mmft_plugins import hf_vision
from mmft_plugins._llava_maps import LLAVA_MAPS

if TYPE_CHECKING:
    from torch import nn


def describe_clip(
    *,
    path: str | Path,
    select_layer: int = -2,
    pad_to_square: bool = True,
    image_size: int | None = None,
    revision: str | None = None,
) -> VisionInfo:
    """As `hf_vision.describe`, with LLaVA-1.5's defaults: the penultimate layer, pictures padded to a square.

    https://github.com/haotian-liu/LLaVA/blob/c121f04/scripts/v1_5/finetune.sh
    """
    return hf_vision.describe(
        path=path, select_layer=select_layer, pad_to_square=pad_to_square, image_size=image_size, revision=revision
    )


def build_clip(
    *,
    path: str | Path,
    select_layer: int = -2,
    pad_to_square: bool = True,
    image_size: int | None = None,
    revision: str | None = None,
) -> "nn.Module":
    """As `hf_vision.build`, with the defaults of `describe_clip`."""
    return hf_vision.build(
        path=path, select_layer=select_layer, pad_to_square=pad_to_square, image_size=image_size, revision=revision
    )


def build_linear(in_features: int, out_features: int, *, init_std: float | None = None) -> "nn.Module":
    """One linear layer. `init_std` as in `build_mlp`."""
    from mmft_plugins._projector import linear

    _check(init_std=init_std)
    return linear(in_features, out_features, init_std=init_std)


def build_mlp(depth: int, /, in_features: int, out_features: int, *, init_std: float | None = None) -> "nn.Module":
    """`depth` linear layers with GELU between them.

    `init_std` is the standard deviation of the last layer's weights at the start; None is torch's default, as in the
    reference. That gives features of about the size of the layer's input, while word embeddings are small (0.02 is
    usual), so a short run spends its first steps on shrinking them. The output's size is `init_std` * sqrt(inputs of
    that layer) * size of its input: 1.5 * std(embeddings) / sqrt(out_features) starts an MLP at the embeddings' scale.
    """
    from mmft_plugins._projector import mlp

    _check(init_std=init_std)
    return mlp(depth, in_features, out_features, init_std=init_std)


def build_pixel_shuffle(
    in_features: int,
    out_features: int,
    *,
    scale: int = 2,
    depth: int = 2,
    norm: bool = True,
    bias: bool = True,
    init_std: float | None = None,
) -> "nn.Module":
    """`scale` x `scale` patches become one token, then `depth` linear layers; `init_std` as in `build_mlp`.

    Raises ValueError for a scale or depth below 1.
    """
    from mmft_plugins._projector import PixelShuffle

    _check(scale=scale, depth=depth, init_std=init_std)
    return PixelShuffle(in_features, out_features, scale=scale, depth=depth, norm=norm, bias=bias, init_std=init_std)


def num_shuffled_tokens(
    num_patches: int,
    *,
    scale: int = 2,
    depth: int = 2,
    norm: bool = True,
    bias: bool = True,
    init_std: float | None = None,
) -> int:
    """Tokens left of `num_patches`. Raises ValueError if the patches are not a square grid, or scale does not fit."""
    _check(scale=scale, depth=depth, init_std=init_std)
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"pixel_shuffle with scale={scale} needs a square grid of patches; {num_patches} patches are none "
            f"({side} x {side} = {side * side})"
        )
    if side % scale:
        fitting = [str(s) for s in range(1, side + 1) if side % s == 0]
        raise ValueError(
            f"pixel_shuffle: a grid of {side} x {side} patches does not divide by scale={scale}; "
            f"this grid takes {', '.join(fitting)}, or choose another image_size"
        )
    return (side // scale) ** 2


def _check(*, scale: int = 1, depth: int = 1, init_std: float | None = None) -> None:
    for name, value in (("scale", scale), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{name}={value}; it must be 1 or more")
    if init_std is not None and init_std <= 0:
        raise ValueError(f"init_std={init_std}; it must be above 0, or None for torch's default")


@hookimpl
def mmft_data_maps() -> Iterable[DataMap]:
    """The formats of LLaVA's published data."""
    return LLAVA_MAPS


@hookimpl
def mmft_vision_encoders() -> Iterable[VisionEncoderSpec]:
    """CLIP as LLaVA uses it."""
    summary = "CLIP, as in LLaVA-1.5: penultimate layer, padded to a square"
    return [
        VisionEncoderSpec(name="clip", describe=describe_clip, build=build_clip, summary=summary, hub_option="path")
    ]


@hookimpl
def mmft_projectors() -> Iterable[ProjectorSpec]:
    """LLaVA's projectors, and one that makes fewer tokens."""
    mlps = [
        ProjectorSpec(
            name=f"mlp{depth}x_gelu",
            build=partial(build_mlp, depth),  # a partial of a module's function pickles, a closure does not
            summary=f"{depth} linear layers with GELU between" + (", as in LLaVA-1.5" if depth == 2 else ""),
        )
        for depth in range(1, 5)
    ]
    return [
        ProjectorSpec(name="linear", build=build_linear, summary="one linear layer, as in the first LLaVA"),
        *mlps,
        ProjectorSpec(
            name="pixel_shuffle",
            build=build_pixel_shuffle,
            num_tokens=num_shuffled_tokens,
            summary="scale x scale patches become one token (4 times fewer at scale 2), then an MLP",
        ),
    ]

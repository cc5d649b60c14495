"""One picture through encoder and projector before anything is trained: what their plugins promise must hold.

A projector of another width would scramble its features without a word, and a patch too many hides behind a projector
that pools. Nothing random is drawn, no statistic and no mode is changed: training starts as if there had been no proof.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from mmft.config.picture import called, failed
from mmft.errors import ModelError
from mmft.specs import VisionInfo

SIDE = 64


def probe_picture() -> PILImage.Image:
    """Dark above, light below: a picture of one colour has no variance, by which an encoder may divide."""
    return PILImage.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")


def transformed(who: str, info: VisionInfo) -> Tensor:
    """float32[3, H, W]: the picture as the encoder takes it. Raises `ModelError` where the transform gives no such."""
    pixels = called(
        who, f"the transform of describe, on a picture of {SIDE} x {SIDE},", info.transform, probe_picture()
    )
    good = isinstance(pixels, Tensor) and pixels.dtype is torch.float32 and pixels.ndim == 3 and pixels.shape[0] == 3
    if not good:
        raise ModelError(
            f"{who}: the transform of describe made {_shown(pixels)} of a picture, expected float32[3, H, W]"
        )
    return pixels  # type: ignore[no-any-return]


def built_part(who: str, build: Any, *args: Any, **options: Any) -> nn.Module:
    """What a plugin's `build` gives. Raises `ModelError` where it fails, or gives no module."""
    module = called(who, "build", build, *args, **options)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{who}: build gave a {type(module).__name__}, expected a torch.nn.Module")
    return module


def prove(who: str, module: nn.Module, inputs: Tensor, expected: Sequence[int], why: str, dtype: torch.dtype) -> Tensor:
    """What a part makes of one picture, in `dtype` as in training; `why` is what the expected shape follows from.

    Raises `ModelError` where the part fails, or gives another shape or numbers that are not finite.
    """
    weights = {name: one for name, one in module.named_parameters() if one.is_floating_point()}
    inputs = inputs.to(next((one.dtype for one in weights.values()), dtype))
    with _undisturbed(module, inputs.device, dtype):
        try:
            features = module(inputs)
        except Exception as error:
            raise failed(who, f"its module, on one picture of {list(inputs.shape)},", module, error) from error
    if not isinstance(features, Tensor):
        raise ModelError(f"{who}: its module made a {type(features).__name__} of one picture, expected a tensor")
    if list(features.shape) != list(expected):
        shapes = f"its module made {list(features.shape)} of one picture, expected {list(expected)}"
        raise ModelError(f"{who}: {shapes}: {why} or the module")
    if not bool(torch.isfinite(features).all()):
        broken = [name for name, one in weights.items() if not bool(torch.isfinite(one).all())]
        if broken:
            what = f", its weight {broken[0]} is not either; correct what it starts from"
        else:
            what = "; correct its forward" + (", or use precision bf16 or fp32" if dtype is torch.float16 else "")
        raise ModelError(f"{who}: its module made numbers of one picture that are not finite{what}")
    return features


@contextmanager
def _undisturbed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """In eval mode, without gradients, as the model computes; modes and random states are put back."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),  # a plugin's forward may draw even so
            torch.no_grad(),
            torch.autocast(device.type, dtype, enabled=dtype is not torch.float32),
        ):
            yield
    finally:
        for part, training in modes:
            part.training = training


def _shown(value: Any) -> str:
    """`float32[1, 3, 16, 16]`, or the type of what is no tensor."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

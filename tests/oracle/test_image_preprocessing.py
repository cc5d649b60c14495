"""ImageTransform gives, bit for bit, what transformers' PIL image processors and LLaVA's own code give.

Bit for bit, not nearly: both sides let Pillow resize bytes, and the arithmetic after it is float64, then float32, in
the same order. A difference of one bit would mean a different step, so there is no tolerance here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmft.images import ImageTransform, open_image, pad_to_square
from mmft.testing import tiny_vision
from mmft_plugins import hf_vision

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
SIZES = [
    (1, 1), (1, 2), (3, 1), (2, 7), (7, 2), (17, 31), (31, 17), (47, 48), (48, 48), (49, 47), (50, 50), (63, 200),
    (200, 63), (301, 299), (333, 640), (640, 427), (1000, 11), (11, 1000), (512, 512),
]  # fmt: skip


def picture(width: int, height: int) -> Image.Image:
    """Smooth and noisy parts, all three channels different."""
    noise = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, width)[None, :, None] * np.array([1.0, 0.6, 0.3])
    return Image.fromarray(((noise + ramp) / 2).astype(np.uint8))


def expected(processor: Any, image: Image.Image) -> torch.Tensor:
    pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


CASES: dict[str, tuple[Any, ImageTransform]] = {
    "clip": (
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        ImageTransform(resize=48, crop=(48, 48), mean=CLIP_MEAN, std=CLIP_STD),
    ),
    "clip, crop smaller than the short edge, odd": (
        CLIPImageProcessorPil(size={"shortest_edge": 51}, crop_size={"height": 44, "width": 37}),
        ImageTransform(resize=51, crop=(44, 37), mean=CLIP_MEAN, std=CLIP_STD),
    ),
    "clip, crop larger than the picture": (
        CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 43, "width": 48}),
        ImageTransform(resize=30, crop=(43, 48), mean=CLIP_MEAN, std=CLIP_STD),
    ),
    "siglip": (
        SiglipImageProcessorPil(size={"height": 48, "width": 48}),
        ImageTransform(resize=(48, 48), mean=HALF, std=HALF),
    ),
    "siglip, not square": (
        SiglipImageProcessorPil(size={"height": 32, "width": 61}),
        ImageTransform(resize=(32, 61), mean=HALF, std=HALF),
    ),
    "vit, bilinear": (
        ViTImageProcessorPil(size={"height": 48, "width": 48}, do_convert_rgb=True),
        ImageTransform(resize=(48, 48), mean=HALF, std=HALF, resample=2),
    ),
    "dinov2, as on the hub": (
        BitImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 49, "width": 49}, image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        ),
        ImageTransform(resize=56, crop=(49, 49), mean=IMAGENET_MEAN, std=IMAGENET_STD),
    ),
    "llava, padded to a square": (
        LlavaImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_pad=True),
        ImageTransform(resize=48, crop=(48, 48), mean=CLIP_MEAN, std=CLIP_STD, pad_to_square=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_transform_equals_transformers_processor_to_the_bit(case: str) -> None:
    processor, transform = CASES[case]
    for size in SIZES:
        image = picture(*size)
        assert torch.equal(transform(image), expected(processor, image)), size


@pytest.mark.parametrize("size", SIZES)
def test_padding_equals_llavas_expand2square(size: tuple[int, int]) -> None:
    def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
        # llava/mm_utils.py of https://github.com/haotian-liu/LLaVA at c121f04, its steps
        width, height = pil_img.size
        if width == height:
            return pil_img
        if width > height:
            result = Image.new(pil_img.mode, (width, width), background_color)
            result.paste(pil_img, (0, (width - height) // 2))
            return result
        result = Image.new(pil_img.mode, (height, height), background_color)
        result.paste(pil_img, ((height - width) // 2, 0))
        return result

    image, color = picture(*size), (122, 116, 104)
    assert pad_to_square(image, color).tobytes() == expand2square(image, color).tobytes()


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_described_transforms_equal_the_checkpoints_own_processor(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    tiny_vision(tmp_path, kind)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    transform = hf_vision.describe(path=tmp_path).transform
    for size in SIZES:
        image = picture(*size)
        assert torch.equal(transform(image), expected(processor, image)), size


def test_transparency_is_handled_as_by_transformers(tmp_path: Path) -> None:
    rgba = picture(40, 30).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((40, 30)))
    rgba.save(tmp_path / "a.png")
    processor, transform = CASES["clip"]
    assert torch.equal(transform(open_image(tmp_path / "a.png")), expected(processor, rgba))

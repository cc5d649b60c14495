"""The image processor of an exported model: transformers' own, with our numbers, tried on pictures."""

from typing import Any

import torch

from mmft.errors import ModelError
from mmft.images import ImageTransform
from mmft.specs import VisionInfo

SIZES = ((640, 427), (211, 640), (48, 48), (90, 33))


def image_processor(info: VisionInfo, name: str) -> Any:
    """An image processor that gives the pixels of `info.transform`, to the bit.

    Raises `ModelError` where the encoder's transform is not made of resizing, cropping, scaling and normalising.
    """
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    transform = info.transform
    if not isinstance(transform, ImageTransform) or transform.output_size is None:
        raise ModelError(
            f"vision encoder {name!r}: its transform ({type(transform).__name__}) is its own, and no image processor "
            "of transformers is known to give its pixels; use `mmft convert merge`"
        )
    height, width = transform.output_size
    resize = transform.resize
    size = {"shortest_edge": resize} if isinstance(resize, int) else {"height": resize[0], "width": resize[1]}
    processor = LlavaImageProcessorPil(
        do_pad=transform.pad_to_square,
        do_resize=True,
        size=size,
        resample=transform.resample,
        do_center_crop=transform.crop is not None,
        crop_size={"height": height, "width": width},  # also where nothing is cropped: vLLM reads the size from it
        do_rescale=True,
        rescale_factor=transform.scale,
        do_normalize=True,
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        do_convert_rgb=True,
    )
    _must_agree(processor, transform, name)
    return processor


def _must_agree(processor: Any, transform: ImageTransform, name: str) -> None:
    from PIL import Image

    for size in SIZES:
        ramp = Image.linear_gradient("L").resize(size)
        picture = Image.merge("RGB", (ramp, ramp.rotate(180), ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        ours = transform(picture)
        if theirs.shape != ours.shape or not torch.equal(theirs, ours):
            by = f"by up to {float((theirs - ours).abs().max()):.2g}" if theirs.shape == ours.shape else "in their size"
            raise ModelError(
                f"vision encoder {name!r}: the pixels of transformers' image processor differ from those of training "
                f"({by}, on a picture of {size[0]} x {size[1]}); use `mmft convert merge`"
            )

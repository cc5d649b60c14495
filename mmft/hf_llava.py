"""transformers' `LlavaForConditionalGeneration` in the form of our `LlavaModel`, so that one session serves both.

Given embeddings, transformers' model is a language model like any other. So it is taken whole as the `llm`, its tower
and projector are handed over as ours, and nothing of its weights is copied or renamed.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from mmft.data.shape import Shape
from mmft.data.tokenize import Tokenizer
from mmft.errors import ModelError
from mmft.hub import HUGGINGFACE, failed
from mmft.modeling.llava import LlavaModel
from mmft.modeling.llm import keep_gradients_after_evaluation
from mmft.specs import VisionInfo

LLAVA = "llava"  # model_type: LLaVA-1.5 and models saved in its form, with one feature map a picture


class Tower(nn.Module):
    """Features of transformers' vision tower, as its LLaVA config asks: float[N, 3, H, W] -> float[N, P, D].

    `vision_feature_layer` is one index or several, whose features are joined; the strategy "default" drops CLS.
    https://github.com/huggingface/transformers, models/llava/modeling_llava.py, `get_image_features`, v5.23.
    """

    def __init__(self, tower: nn.Module, config: Any) -> None:
        super().__init__()
        self.tower = tower
        layers = config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.first = 1 if config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return torch.cat([states[layer][:, self.first :] for layer in self.layers], dim=-1)


def load_hf_llava(
    path: str, *, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> tuple[LlavaModel, Shape]:
    """The model of a folder or name, and what is known of it. Tower and projector are never quantised.

    Raises `ModelError` where it does not load whole.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if quantization not in (None, "none"):
        options |= {"quantization_config": _quantization(str(quantization), dtype), "device_map": {"": device}}
    try:
        hf, info = LlavaForConditionalGeneration.from_pretrained(path, **options)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(failed("model", path, HUGGINGFACE, error)) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}")
    if quantization in (None, "none"):
        hf.to(device)
    keep_gradients_after_evaluation(hf)  # its CPU kernel has no room for small layers either
    hf.requires_grad_(False).eval()
    transform = _transform(processor)
    model = LlavaModel(
        hf, vision=Tower(hf.model.vision_tower, hf.config), projector=hf.model.multi_modal_projector,
        image_id=hf.config.image_token_id, dtype=dtype,
    )  # fmt: skip
    with torch.no_grad(), model.autocast():
        features = model.encode_images(transform(PILImage.new("RGB", (64, 64)))[None])
    vision = VisionInfo(hidden_size=features.shape[2], num_patches=features.shape[1], transform=transform)
    return model, Shape(Tokenizer(tokenizer, features.shape[1], hf.config.image_token_id), vision)


def _transform(processor: Any) -> Callable[[PILImage.Image], Tensor]:
    """The model's own image processor."""

    def transform(image: PILImage.Image) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    return transform


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    """As `mmft.modeling.llm` quantises a language model, with the rest left alone."""
    from transformers import BitsAndBytesConfig

    apart = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=apart)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=apart,
    )  # fmt: skip

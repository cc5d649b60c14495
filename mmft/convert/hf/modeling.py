"""LLaVA with a projector that transformers has no class for, as `mmft convert hf` writes it beside the weights.

Needs nothing but transformers: `AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)`. All but
the projector is transformers' LlavaForConditionalGeneration.
"""

import math

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration


class MmftLlavaConfig(LlavaConfig):  # type: ignore[misc]
    """A LLaVA config that says of which layers the projector is made.

    `projector_layers` are `["linear", in, out, bias]`, `["layer_norm", width, eps]` and `["gelu"]`; before them each
    `projector_scale` x `projector_scale` square of patches becomes one token. `num_prefix_tokens` of the encoder's
    tokens, its CLS and registers, stand before the patches and are left out.
    """

    model_type = "mmft_llava"

    projector_layers: list | None = None  # type: ignore[type-arg]
    projector_scale: int = 1
    num_prefix_tokens: int = 0


class Projector(nn.Module):
    """float[N, tokens, in] -> float[N, patches / scale^2, out]."""

    def __init__(self, config: MmftLlavaConfig) -> None:
        super().__init__()
        self.scale, self.skip = config.projector_scale, config.num_prefix_tokens
        self.layers = nn.Sequential(*(_layer(*one) for one in config.projector_layers or ()))

    def forward(self, image_features: Tensor) -> Tensor:
        """See the class."""
        features = image_features[:, self.skip :]
        if self.scale > 1:
            images, patches, width = features.shape
            side, scale = math.isqrt(patches) // self.scale, self.scale
            squares = features.reshape(images, side, scale, side, scale, width).permute(0, 1, 3, 2, 4, 5)
            features = squares.reshape(images, side * side, scale * scale * width)
        result: Tensor = self.layers(features)
        return result


def _layer(kind: str, *sizes: float) -> nn.Module:
    if kind == "linear":
        return nn.Linear(int(sizes[0]), int(sizes[1]), bias=bool(sizes[2]))
    if kind == "layer_norm":
        return nn.LayerNorm(int(sizes[0]), eps=sizes[1])
    return nn.GELU()


class MmftLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """transformers' LLaVA with this projector."""

    config: MmftLlavaConfig

    def __init__(self, config: MmftLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = Projector(config)
        self.post_init()

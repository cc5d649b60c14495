"""Projectors from vision features to word embeddings. Each maps float[N, P, in] to float[N, P', out].

Keys of the weights are those of the public checkpoints: an `mlpNx_gelu` is the torch.nn.Sequential of LLaVA's
`mm_projector.bin`, `pixel_shuffle`'s `mlp` is InternVL's `mlp1`.
"""

import math

from torch import Tensor, nn


def linear(in_features: int, out_features: int, *, init_std: float | None = None) -> nn.Linear:
    """One linear layer: LLaVA's first projector (https://arxiv.org/abs/2304.08485, section 4.1)."""
    layer = nn.Linear(in_features, out_features)
    _start_at(layer, init_std)
    return layer


def mlp(depth: int, in_features: int, out_features: int, *, init_std: float | None = None) -> nn.Sequential:
    """Linear, then `depth - 1` times (GELU, Linear): LLaVA's `build_vision_projector`, with its indices.

    https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/model/multimodal_projector/builder.py; depth 2 is that of
    LLaVA-1.5 (https://arxiv.org/abs/2310.03744, section 3.2).
    """
    return nn.Sequential(*_layers(depth, in_features, out_features, bias=True, init_std=init_std))


class PixelShuffle(nn.Module):
    """Fewer, wider tokens: each `scale` x `scale` square of patches becomes one token, then an MLP.

    float[N, g*g, D] -> float[N, (g/scale)^2, out]. A token holds its patches row by row, the order of Idefics3 and
    InternVL. `depth=1, norm=False, bias=False` is the connector of nanoVLM and Idefics3
    (https://arxiv.org/abs/2408.12637, section 3.2.1), the default that of InternVL (LayerNorm, Linear, GELU, Linear;
    https://arxiv.org/abs/2404.16821, section 3.1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: int = 2,
        depth: int = 2,
        norm: bool = True,
        bias: bool = True,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        wide = scale * scale * in_features
        layers = _layers(depth, wide, out_features, bias=bias, init_std=init_std)
        self.mlp = nn.Sequential(*([nn.LayerNorm(wide)] if norm else []), *layers)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.mlp(space_to_depth(features, self.scale))
        return result


def space_to_depth(features: Tensor, scale: int) -> Tensor:
    """float[N, g*g, D] in raster order -> float[N, (g/scale)^2, scale*scale*D], the channels of a square row by row."""
    images, patches, width = features.shape
    small = math.isqrt(patches) // scale
    squares = features.reshape(images, small, scale, small, scale, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(images, small * small, scale * scale * width)


def _layers(depth: int, in_features: int, out_features: int, *, bias: bool, init_std: float | None) -> list[nn.Module]:
    last = nn.Linear(in_features, out_features, bias=bias)
    layers: list[nn.Module] = [last]
    for _ in range(1, depth):
        last = nn.Linear(out_features, out_features, bias=bias)
        layers += [nn.GELU(), last]
    _start_at(last, init_std)
    return layers


def _start_at(layer: nn.Linear, std: float | None) -> None:
    if std is not None:
        nn.init.normal_(layer.weight, std=std)

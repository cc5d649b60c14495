"""What a projector is made of, read from the module itself: which class of transformers has a place for it follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from mmft.errors import ModelError


@runtime_checkable
class Shuffled(Protocol):
    """A projector that makes one token of `scale` x `scale` patches, row by row, and then runs `mlp`."""

    scale: int
    mlp: nn.Sequential


@dataclass(frozen=True)
class ProjectorLayout:
    """The layers of a projector in order: Linear, GELU and LayerNorm; `scale` x `scale` patches give one token."""

    scale: int
    layers: tuple[nn.Module, ...]

    @property
    def kinds(self) -> tuple[type[nn.Module], ...]:
        """The classes of the layers."""
        return tuple(type(layer) for layer in self.layers)

    def specs(self) -> list[list[str | float]]:
        """The layers as plain values, as `modeling` builds them again."""
        return [_spec(layer) for layer in self.layers]

    def biases(self) -> Sequence[bool]:
        """Of each linear layer, whether it has one."""
        return [layer.bias is not None for layer in self.layers if isinstance(layer, nn.Linear)]


def read_projector(module: nn.Module, name: str) -> ProjectorLayout:
    """The layout of a projector. Raises `ModelError` for one that is made otherwise, with what to choose."""
    scale, inner = (module.scale, module.mlp) if isinstance(module, Shuffled) else (1, module)
    layers = tuple(inner) if isinstance(inner, nn.Sequential) else (inner,)
    foreign = [type(layer).__name__ for layer in layers if not _is_plain(layer)]
    if foreign:
        raise ModelError(
            f"projector {name!r}: {foreign[0]} has no place in a class of transformers, nor in the code that is "
            "written beside an export, which knows linear layers, GELU, LayerNorm and pixel shuffle; train with "
            "'mlp2x_gelu' or 'pixel_shuffle' to export it, or use `mmft convert merge` and serve it with mmft"
        )
    return ProjectorLayout(scale, layers)


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer is one of three, and does nothing that `_spec` does not say."""
    if type(layer) is nn.GELU:
        return layer.approximate == "none"
    if type(layer) is nn.LayerNorm:
        return layer.elementwise_affine and layer.bias is not None and len(layer.normalized_shape) == 1
    return type(layer) is nn.Linear


def _spec(layer: nn.Module) -> list[str | float]:
    if isinstance(layer, nn.Linear):
        return ["linear", layer.in_features, layer.out_features, layer.bias is not None]
    if isinstance(layer, nn.LayerNorm):
        return ["layer_norm", layer.normalized_shape[0], layer.eps]
    return ["gelu"]

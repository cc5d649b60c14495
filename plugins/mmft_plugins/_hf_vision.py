"""The torch side of hf_vision: load the blocks that are used, and give patch features only.

What the model does is tried out before its weights are read: how many tokens it puts before the patches, whether it
takes pictures of this size, and which parameters the features depend on (on the meta device, where that costs
nothing). No submodule is named, because their names change between transformers releases.
"""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from mmft.errors import ModelError
from mmft_plugins.hf_vision import PatchGrid


class PatchEncoder(nn.Module):
    """Patch features of one hidden state, in raster order, without CLS and register tokens.

    pixel_values float[N, 3, H, W] -> float[N, P, D] in the dtype of the weights. `model` is the transformers model
    with `layer` blocks; its parameters behind the selected state (final norm, pooling head) never get a gradient.
    """

    def __init__(self, model: PreTrainedModel, *, layer: int, num_prefix_tokens: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.num_prefix_tokens = num_prefix_tokens
        self._options = options

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        # transformers 5.23 keeps only the listed states in memory; a release that takes the list for True keeps all,
        # at the same places. A list, because the index 0 alone would read as False.
        outputs = self.model(pixel_values.to(self.model.dtype), output_hidden_states=[self.layer], **self._options)
        features: Tensor = outputs.hidden_states[self.layer]
        return features[:, self.num_prefix_tokens :]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What trying the model out has told."""

    num_prefix_tokens: int
    options: dict[str, Any]
    used: frozenset[str]  # parameters the features depend on
    known: frozenset[str]  # parameters and buffers of the model with all its blocks
    children: frozenset[str]


def load_encoder(path: str | Path, config: Any, *, layer: int, grid: PatchGrid, revision: str | None) -> PatchEncoder:
    """Load the first `layer` blocks (at least one) of the vision model at `path`.

    Raises ModelError if a weight the features depend on is missing or of another shape, or if the checkpoint holds one
    inside the vision model that the model does not have. Text towers, heads and later blocks may be left over.
    """
    wanted = copy.deepcopy(config)
    wanted.num_hidden_layers = max(layer, 1)  # hidden state 0 is recorded as the first block's input
    if layer < config.num_hidden_layers:
        wanted.tie_last_hidden_states = False  # or our last block's output would be replaced by the normed one
    plan = _plan(path, config, wanted, layer=layer, grid=grid)
    try:
        model, info = AutoModel.from_pretrained(
            path,
            config=wanted,
            dtype=torch.float32,
            output_loading_info=True,
            **({"revision": revision} if revision else {}),
        )
    except Exception as error:  # OSError, RuntimeError, SafetensorError, UnpicklingError: all of them are the file's
        raise ModelError(f"vision encoder {path}: its weights cannot be loaded: {error}") from error
    missing = sorted(set(info["missing_keys"]) & plan.used)
    if missing:
        raise ModelError(f"vision encoder {path}: {len(missing)} of its weights are missing, such as {missing[0]}")
    foreign = sorted(key for key in info["unexpected_keys"] if _is_foreign(key, model.base_model_prefix, plan))
    if foreign:
        raise ModelError(
            f"vision encoder {path}: {len(foreign)} of its weights have no place in a {type(model).__name__} with this "
            f"config, such as {foreign[0]}"
        )
    encoder = PatchEncoder(model, layer=layer, num_prefix_tokens=plan.num_prefix_tokens, options=plan.options)
    return encoder.eval()


def _is_foreign(key: str, prefix: str, plan: _Plan) -> bool:
    """A left-over weight inside the vision model that is not one of a block we chose not to build."""
    name = key.removeprefix(f"{prefix}.")
    return name not in plan.known and name.split(".")[0] in plan.children


def _plan(path: str | Path, config: Any, wanted: Any, *, layer: int, grid: PatchGrid) -> _Plan:
    """Try the model out. Raises ModelError if it cannot encode pictures of this size, patch by patch."""
    height, width = grid.image_size
    try:
        with torch.device("meta"), torch.inference_mode(False):
            whole, model = AutoModel.from_config(config), AutoModel.from_config(wanted)
    except ValueError as error:
        raise ModelError(f"vision encoder {path}: {str(error).splitlines()[0]}") from error
    native = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    # Models without the argument interpolate always, as DINOv2, or cannot.
    options = {"interpolate_pos_encoding": True} if interpolates and tuple(native) != grid.image_size else {}
    try:
        prefix = _prefix_tokens(config, grid, options)
        with torch.inference_mode(False), torch.enable_grad():  # the caller may have switched either
            pixels = torch.empty(1, 3, height, width, device="meta")
            model(pixels, output_hidden_states=[layer], **options).hidden_states[layer].sum().backward()
    except Exception as error:  # whatever a model raises here, it does not take these pictures
        raise ModelError(
            f"vision encoder {path}: {type(model).__name__} does not give one feature for each of the {grid.rows} x "
            f"{grid.columns} patches of a picture of {height} x {width} (it was made for {native[0]} x {native[1]}): "
            f"{error}"
        ) from error
    names = {name for name, _ in whole.named_parameters()} | {name for name, _ in whole.named_buffers()}
    return _Plan(
        num_prefix_tokens=prefix,
        options=options,
        used=frozenset(name for name, parameter in model.named_parameters() if parameter.grad is not None),
        known=frozenset(names),
        children=frozenset(name for name, _ in whole.named_children()),
    )


def _prefix_tokens(config: Any, grid: PatchGrid, options: dict[str, Any]) -> int:
    """How many tokens stand before the patches, and that the patches follow row by row to the end.

    Changing one patch must change one embedding, at its place in raster order. Counting alone would believe YOLOS,
    whose extra tokens are at the end. One random block is enough: hidden state 0 is what it is given.
    """
    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = AutoModel.from_config(short).eval()
        index = min(1, len(grid) - 1)  # the second patch tells rows from columns
        top, left = index // grid.columns * grid.patch_size[0], index % grid.columns * grid.patch_size[1]
        pixels = torch.zeros(2, 3, *grid.image_size)
        pixels[1, :, top : top + grid.patch_size[0], left : left + grid.patch_size[1]] = 10.0
        embeddings = model(pixels, output_hidden_states=[0], **options).hidden_states[0]
    if embeddings.ndim != 3:
        raise ValueError(f"its hidden states have the shape {list(embeddings.shape)}, expected [N, P, D]")
    change = (embeddings[1] - embeddings[0]).abs().amax(-1)
    found = torch.nonzero(change > 1e-3 * change.max()).flatten().tolist()
    prefix = int(embeddings.shape[1]) - len(grid)
    if found != [prefix + index]:
        raise ValueError(
            f"it has {embeddings.shape[1]} tokens, and patch {index} is seen in token {', '.join(map(str, found))}, "
            f"not in {prefix + index}"
        )
    return prefix

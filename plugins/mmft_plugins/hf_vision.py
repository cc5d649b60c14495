"""Vision encoders of transformers: any plain ViT that gives hidden states, with or without CLS and register tokens.

One implementation under the names people look for (`siglip`, `dinov2`, `vit`, and `clip` in the llava plugin); what
differs between them is read from their files. `describe` reads config.json and preprocessor_config.json; weights and
torch modules are in `_hf_vision`, which `build` imports.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmft import VisionEncoderSpec, VisionInfo, hookimpl
from mmft.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from mmft.images import ImageTransform

# What a transformers image processor may be asked to do and ImageTransform repeats.
STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The patches of a picture of `image_size` (height, width); a remainder at the edges is cut, as the models do."""

    image_size: tuple[int, int]
    patch_size: tuple[int, int]

    @property
    def rows(self) -> int:
        """Patches from top to bottom."""
        return self.image_size[0] // self.patch_size[0]

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return self.image_size[1] // self.patch_size[1]

    def __len__(self) -> int:
        return self.rows * self.columns


def describe(
    *,
    path: str | Path,
    select_layer: int = -2,
    pad_to_square: bool = False,
    image_size: int | None = None,
    revision: str | None = None,
) -> VisionInfo:
    """What the encoder at `path`, a folder or a hub name, will give, without reading its weights.

    `select_layer` is an index into transformers' hidden_states, as in LLaVA: 0 are the embeddings, -1 is the last
    block's output (before the final norm, in CLIP, SigLIP, DINOv2 and ViT), -2, LLaVA-1.5's choice, that of the block
    before. `image_size` makes square pictures of another size than the processor's, resized and cropped to exactly
    that; the model interpolates its position table.

    Raises ModelError for missing files, a layer that does not exist, and image processors with other steps than
    resize, crop, scale and normalise.
    """
    config = read_vision_config(path, revision)
    layer_index(select_layer, config.num_hidden_layers, path)
    transform = _read_transform(path, revision, pad_to_square=pad_to_square, image_size=image_size)
    grid = patch_grid(config, transform, path)
    return VisionInfo(hidden_size=config.hidden_size, num_patches=len(grid), transform=transform)


def build(
    *,
    path: str | Path,
    select_layer: int = -2,
    pad_to_square: bool = False,
    image_size: int | None = None,
    revision: str | None = None,
) -> "nn.Module":
    """The encoder with its weights, float32, in eval mode: float[N, 3, H, W] -> float[N, num_patches, hidden_size].

    Options as in `describe`. Blocks behind `select_layer` are not built; of a CLIP or SigLIP checkpoint only the vision
    part is. Raises ModelError as `describe`, and where weights are missing or left over, or the model cannot take
    pictures of `image_size`.
    """
    from mmft_plugins._hf_vision import load_encoder

    config = read_vision_config(path, revision)
    layer = layer_index(select_layer, config.num_hidden_layers, path)
    transform = _read_transform(path, revision, pad_to_square=pad_to_square, image_size=image_size)
    grid = patch_grid(config, transform, path)
    with quiet_transformers():
        return load_encoder(path, config, layer=layer, grid=grid, revision=revision)


def read_vision_config(path: str | Path, revision: str | None) -> Any:
    """The transformers config of the vision part. Raises ModelError if there is none, or it is not that of a ViT."""
    from transformers import AutoConfig

    _require_file(path, "config.json")
    try:
        config = AutoConfig.from_pretrained(path, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(path, "config.json", error)) from error
    config = getattr(config, "vision_config", config)
    needed = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    absent = [name for name in needed if not hasattr(config, name)]
    if absent:
        raise ModelError(
            f"vision encoder {path}: its config ({config.model_type}) has no {', '.join(absent)}, so it is not a ViT "
            "with one picture size; offer it from a plugin of its own"
        )
    return config


def layer_index(select_layer: int, num_layers: int, path: str | Path) -> int:
    """`select_layer` counted from the front: 0 are the embeddings, `num_layers` is the output of the last block."""
    if not -num_layers - 1 <= select_layer <= num_layers:
        raise ModelError(
            f"vision encoder {path}: select_layer={select_layer}, but it has {num_layers} blocks; allowed are "
            f"0 (the embeddings) to {num_layers} (the last block), or {-num_layers - 1} to -1 counted from the end"
        )
    return select_layer % (num_layers + 1)


def patch_grid(config: Any, transform: "ImageTransform", path: str | Path) -> PatchGrid:
    """The patches of a transformed picture. Raises ModelError if pictures differ in size or hold no patch."""
    size = transform.output_size
    if size is None:
        raise ModelError(
            f"vision encoder {path}: its image processor keeps the shape of the picture, and pictures of one size are "
            "needed; set image_size, or pad_to_square=True"
        )
    patch = config.patch_size if isinstance(config.patch_size, list | tuple) else (config.patch_size,) * 2
    if size[0] < patch[0] or size[1] < patch[1]:
        raise ModelError(
            f"vision encoder {path}: pictures of {size[0]} x {size[1]} are smaller than one patch, {patch[0]} x "
            f"{patch[1]}; choose a larger image_size"
        )
    return PatchGrid(size, (patch[0], patch[1]))


def _read_transform(
    path: str | Path, revision: str | None, *, pad_to_square: bool, image_size: int | None
) -> "ImageTransform":
    """The steps of the checkpoint's image processor, as numbers.

    transformers' own class reads the file, because old files leave out what the class knows (google/vit-* has neither
    resample nor do_rescale). That the numbers are the whole story is then tried on a picture, not assumed.
    """
    from transformers import AutoImageProcessor

    _require_file(path, "preprocessor_config.json", "processor_config.json")
    try:
        with quiet_transformers():
            options = {"revision": revision} if revision else {}
            processor = AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(path, "preprocessor_config.json", error)) from error
    own = [name for name in dir(processor) if name.startswith("do_") and name not in STEPS and getattr(processor, name)]
    size, crop = processor.size, processor.crop_size
    edges = size.shortest_edge or (size.height and size.width and (size.height, size.width))
    if own or not processor.do_resize or not edges or size.longest_edge:
        reason = ", ".join(own) if own else f"size {dict(size)}" if processor.do_resize else "no do_resize"
        raise ModelError(
            f"vision encoder {path}: {type(processor).__name__} does other steps ({reason}) than resize to a fixed "
            "size, crop, scale and normalise; offer this encoder from a plugin with a transform of its own"
        )
    from mmft.images import ImageTransform

    transform = ImageTransform(
        resize=edges,
        crop=(crop.height, crop.width) if processor.do_center_crop else None,
        resample=int(processor.resample),
        scale=processor.rescale_factor if processor.do_rescale else 1.0,
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
    )
    _must_agree(transform, processor, path)
    if image_size is not None:
        square = (image_size, image_size)
        fixed = isinstance(transform.resize, tuple)
        crop_to = None if fixed and transform.crop is None else square
        transform = replace(transform, resize=square if fixed else image_size, crop=crop_to)
    return replace(transform, pad_to_square=pad_to_square)


def _must_agree(transform: "ImageTransform", processor: Any, path: str | Path) -> None:
    """Try both on a picture: a processor class may do more than its settings say."""
    import torch
    from PIL import Image

    probe = Image.linear_gradient("L").resize((61, 47)).convert("RGB")
    theirs = processor(images=probe, return_tensors="pt")["pixel_values"][0]
    if not torch.equal(transform(probe), theirs):
        raise ModelError(
            f"vision encoder {path}: {type(processor).__name__} gives other pixels than its settings say; "
            "offer this encoder from a plugin with a transform of its own"
        )


def _require_file(path: str | Path, *names: str) -> None:
    """In a local folder one of these files must be there; a hub name is left to transformers."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise ModelError(f"vision encoder {path}: the folder has no {' or '.join(names)}; it holds {_listing(folder)}")


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _not_found(path: str | Path, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(path).is_dir():
        return f"vision encoder {path}: {name} not read: {reason}"
    return (
        f"vision encoder {path}: {str(path)!r} is no folder and its {name} was not found on the hub: either the name "
        f"is wrong, or the hub cannot be reached (no network, or offline mode without a download): {reason}"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' load table and notices, which call our own choices (blocks not built) suspicious."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@hookimpl
def mmft_vision_encoders() -> Iterable[VisionEncoderSpec]:
    """The names differ for the reader only: each takes any checkpoint the others take."""
    summaries = {
        "siglip": "SigLIP and SigLIP 2 of fixed size",
        "dinov2": "DINOv2, with or without registers",
        "vit": "ViT, and other encoders like it",
    }
    return [
        VisionEncoderSpec(name=name, describe=describe, build=build, summary=summary, hub_option="path")
        for name, summary in summaries.items()
    ]

"""Features of a frozen encoder, computed once for each picture and kept on disk.

No decoding, no resizing and no encoder pass from then on, in this stage and the next: the store is keyed by encoder,
options, its files and the dtype, and a picture by the sha256 of its bytes. Only what a projector sees is stored
(before the projector), so it stays valid while the projector trains.

A picture that cannot be read has a reason instead of features; what becomes of its sample is the collator's affair, as
it is where pictures are opened while training.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmft.config import Use, Vision
from mmft.errors import DataError
from mmft.images import open_image
from mmft.modeling.llava import LlavaModel
from mmft.specs import VisionInfo
from mmft.types import Image

BATCH = 16  # pictures encoded at a time


class FeatureStore:
    """Rows of [P, Dv] in one append-only file, memory-mapped; bfloat16 is stored as its bits."""

    def __init__(self, folder: Path, info: VisionInfo, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.row_shape = (info.num_patches, info.hidden_size)
        self._storage = np.dtype({torch.float32: np.float32}.get(dtype, np.uint16))
        self._rows: dict[str, int] = {}
        self._keys: dict[str, str] = {}
        self.unreadable: dict[str, DataError] = {}  # by the key of a picture: not kept on disk, it may be mended
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "index.json").is_file():
            self._rows = json.loads((folder / "index.json").read_text("utf-8"))

    @classmethod
    def for_encoder(cls, vision: Vision, info: VisionInfo, dtype: torch.dtype) -> "FeatureStore":
        """The store of this encoder with these options and files."""
        assert vision.feature_cache is not None
        return cls(vision.feature_cache / encoder_digest(vision.encoder, info, dtype), info, dtype)

    @property
    def bytes_per_image(self) -> int:
        """Disk space of one picture's features."""
        return self.row_shape[0] * self.row_shape[1] * self._storage.itemsize

    def missing(self, sources: Sequence[str]) -> dict[str, str]:
        """sha256 -> one path, of the pictures that are not stored yet and not known to be unreadable."""
        keys = [(self._key(source), source) for source in reversed(sources)]
        return {key: source for key, source in keys if key not in self._rows and key not in self.unreadable}

    def fill(
        self, sources: Sequence[str], model: LlavaModel, transform: Callable[[Any], Tensor], *, refuse: bool = True
    ) -> int:
        """Encode and store what is missing; returns how many pictures that were.

        Raises `DataError` for a picture that cannot be read; not with `refuse=False`, then it is in `unreadable`.
        """
        todo = list(self.missing(sources).items())
        # a killed run may have left rows that the index does not know: they are overwritten
        with (self.folder / "features.bin").open("r+b" if (self.folder / "features.bin").exists() else "w+b") as file:
            file.truncate(len(self._rows) * self.bytes_per_image)
            file.seek(0, os.SEEK_END)
            for start in range(0, len(todo), BATCH):
                pixels = self._opened(todo[start : start + BATCH], transform)
                if not pixels:
                    continue
                with torch.no_grad(), model.autocast():
                    features = model.encode_images(torch.stack(list(pixels.values())))
                self._to_storage(features).tofile(file)
                self._rows |= {key: len(self._rows) + i for i, key in enumerate(pixels)}
        self._write_index()
        wrong = [self.unreadable[key] for key in map(self._key, sources) if key in self.unreadable]
        if wrong and refuse:
            raise DataError(f"{wrong[0]} (data.on_bad_sample is 'error')")
        return sum(key in self._rows for key, _ in todo)

    def _opened(self, part: Sequence[tuple[str, str]], transform: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Key -> float32[3, H, W] of the pictures that can be read; why the others cannot is kept."""
        pixels = {}
        for key, source in part:
            try:
                opened = open_image(source)
                try:
                    pixels[key] = transform(opened)
                except DataError as error:
                    raise DataError(f"{source}: {error}") from error
            except DataError as error:
                self.unreadable[key] = error
        return pixels

    def check(self, images: Sequence[Image]) -> None:
        """Raise the `DataError` of the first image that could not be read."""
        for image in images:
            error = self.unreadable.get(self._key(str(image.source)))
            if error:
                raise error

    def read(self, images: Sequence[Image]) -> Tensor:
        """[N, P, Dv] in the encoder's dtype, for images that `fill` has seen; zeros for one that cannot be read."""
        rows = np.zeros((len(images), *self.row_shape), self._storage)
        stored = [(i, row) for i, image in enumerate(images) if (row := self._row(image)) is not None]
        if stored:
            data = np.memmap(self.folder / "features.bin", self._storage, "r").reshape(-1, *self.row_shape)
            rows[[i for i, _ in stored]] = data[[row for _, row in stored]]
        tensor = torch.from_numpy(rows)
        return tensor if self.dtype is torch.float32 else tensor.view(self.dtype)

    def _row(self, image: Image) -> int | None:
        key = self._key(str(image.source))
        return None if key in self.unreadable else self._rows[key]

    def _key(self, source: str) -> str:
        """The sha256 of a picture; of a file that cannot be read at all its path, and the reason is kept."""
        if source not in self._keys:
            try:
                self._keys[source] = _sha256(source)
            except DataError as error:
                self._keys[source], self.unreadable[source] = source, error
        return self._keys[source]

    def _to_storage(self, features: Tensor) -> NDArray[Any]:
        features = features.to(self.dtype).cpu().contiguous()
        array: NDArray[Any] = (features if self.dtype is torch.float32 else features.view(torch.uint16)).numpy()
        return array

    def _write_index(self) -> None:
        temporary = self.folder / "index.json.tmp"
        temporary.write_text(json.dumps(self._rows), "utf-8")
        temporary.replace(self.folder / "index.json")


def encoder_digest(encoder: Use, info: VisionInfo, dtype: torch.dtype) -> str:
    """Of everything the features depend on but the picture: name, options, transform, dtype, and local files."""
    digest = hashlib.sha256(f"{encoder.model_dump_json()} {info.transform!r} {dtype} {torch.__version__}".encode())
    for option in encoder.options.values():
        place = Path(option) if isinstance(option, str | Path) and str(option) else None
        if place and place.is_file():
            digest.update(f"{place.name} {_sha256(str(place))}".encode())
        elif place and place.is_dir():
            for path in sorted(place.iterdir()):
                if path.suffix in (".json", ".safetensors", ".bin"):
                    digest.update(f"{path.name} {_sha256(str(path))}".encode())
    return digest.hexdigest()[:16]


def _sha256(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"image not found: {path}") from error

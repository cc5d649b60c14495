"""Samples to tensors. Images are opened here, in the DataLoader's workers, and nowhere earlier.

The `flat` layout is the rule: the samples of a batch follow one another in one row, position ids restart with each, and
nothing is padded. `padded` is for attention implementations that cannot keep samples of one row apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from mmft.data.store import REPLACED, Drop, StoredSample, TokenStore
from mmft.errors import DataError
from mmft.images import open_image
from mmft.types import IGNORE_INDEX, Batch, Image, PackedSample, TokenizedSample

Layout = Literal["flat", "padded"]
BAD_SAMPLES = "bad_samples"  # the key of a batch under which a list of `Drop` says what could not be read
ORIGINS = "origins"  # the key under which (source, record, length) says where each sample of a batch is from
DATASET_IDS = "dataset_ids"  # int64[B, T]: which dataset each token is from, for the loss of each
REPLACEMENTS_TRIED = 64  # draws until a shorter sample is found; then the sample is dropped instead
UNREADABLE = "image cannot be read"


class FeatureReader(Protocol):
    """Where cached features of images come from: float[N, P, Dv] for N images."""

    def read(self, images: Sequence[Image]) -> Tensor:
        """The features of some images, in their order; zeros for an image that could not be read."""
        ...

    def check(self, images: Sequence[Image]) -> None:
        """Raise `DataError` for an image that could not be read."""
        ...


@dataclass(frozen=True)
class Collator:
    """A picklable collate function: a list of samples, packed or not, to a `Batch`.

    What becomes of a sample whose picture cannot be read is decided here, and told under `BAD_SAMPLES` in the batch.
    `store` is where a replacement comes from; without one, `replace` is `drop`.
    """

    layout: Layout
    pad_id: int = 0
    transform: Callable[[Any], Tensor] | None = None
    features: FeatureReader | None = None
    on_bad_sample: Literal["error", "drop", "replace"] = "error"
    store: TokenStore | None = None
    seed: int = 0
    tells_origins: bool = False  # under `ORIGINS`; the trainer takes it out
    datasets: tuple[str, ...] = ()  # sources, where each token's dataset is to be told under `DATASET_IDS`

    def __call__(self, items: Sequence[TokenizedSample | PackedSample]) -> Batch:
        """The batch of some samples.

        Raises `DataError` for an image that cannot be read, under `on_bad_sample="error"`, with its file and record.
        """
        samples = [s for item in items for s in (item.samples if isinstance(item, PackedSample) else (item,))]
        bad: list[Drop] = []
        pictures: list[Tensor] = []
        if any(sample.images for sample in samples):
            samples, pictures = self._with_pictures(samples, bad)
        batch = flat_batch(samples) if self.layout == "flat" else padded_batch(samples, self.pad_id)
        images = [image for sample in samples for image in sample.images]
        if images and self.features is not None:
            batch["image_features"] = self.features.read(images)
        elif pictures:
            batch["pixel_values"] = torch.stack(pictures)
        if self.datasets:
            batch[DATASET_IDS] = self._dataset_ids(samples, batch)  # type: ignore[literal-required]
        if self.tells_origins:
            batch[ORIGINS] = tuple(map(_origin_of, samples))  # type: ignore[literal-required]
        if bad:
            batch[BAD_SAMPLES] = bad  # type: ignore[literal-required]  # not for the model: the trainer takes it out
        return batch

    def _dataset_ids(self, samples: Sequence[TokenizedSample], batch: Batch) -> Tensor:
        """int64[B, T]: the place of each token's source in `datasets`; the first where a sample has none."""
        places = {source: place for place, source in enumerate(self.datasets)}
        ids = torch.tensor([places.get(_origin_of(sample)[0], 0) for sample in samples])
        if self.layout == "flat":
            return ids.repeat_interleave(torch.tensor([len(sample) for sample in samples]))[None]
        return ids[:, None].expand(-1, batch["input_ids"].shape[1])

    def _with_pictures(
        self, samples: Sequence[TokenizedSample], bad: list[Drop]
    ) -> tuple[list[TokenizedSample], list[Tensor]]:
        """The samples to train and float32[3, H, W] of each of their pictures; what could not be read is in `bad`."""
        kept: list[TokenizedSample] = []
        pictures: list[Tensor] = []
        for given in samples:
            sample = given
            try:
                pixels = self._pixels(sample)
            except DataError as error:
                drop = _drop_of(sample, str(error))
                if self.on_bad_sample == "error":
                    raise DataError(str(drop) if drop.source else drop.reason) from error
                found = self._replacement(sample) if self.on_bad_sample == "replace" else None
                bad.append(replace(drop, action=REPLACED) if found else drop)
                sample, pixels = found or self._without_lesson(sample)
            kept.append(sample)
            pictures += pixels
        return kept, pictures

    def _pixels(self, sample: TokenizedSample) -> list[Tensor]:
        """float32[3, H, W] of each picture of a sample, none where features are cached; an error names it."""
        if self.features is not None:
            self.features.check(sample.images)
            return []
        pixels = []
        for image in sample.images:
            opened = open_image(image.source)
            assert self.transform is not None
            try:
                pixels.append(self.transform(opened))
            except DataError as error:
                raise DataError(f"{image.source}: {error}") from error
        return pixels

    def _without_lesson(self, sample: TokenizedSample) -> tuple[TokenizedSample, list[Tensor]]:
        """The same tokens with no target, and black for its pictures: the row keeps its shape, nothing is learnt."""
        silent = replace(sample, loss_mask=np.zeros_like(sample.loss_mask))
        if self.features is not None:
            return silent, []  # what cannot be read is cached as zeros
        assert self.transform is not None
        black = torch.zeros_like(self.transform(PILImage.new("RGB", (32, 32))))
        return silent, [black] * len(sample.images)

    def _replacement(self, sample: TokenizedSample) -> tuple[TokenizedSample, list[Tensor]] | None:
        """Another sample that is not longer and whose pictures can be read: a function of the seed and the sample."""
        if self.store is None or not isinstance(sample, StoredSample):
            return None
        random = np.random.default_rng([self.seed, sample.item])
        for item in random.integers(len(self.store), size=REPLACEMENTS_TRIED).tolist():
            first, stop = self.store.offsets[self.store.index[item] : self.store.index[item] + 2]
            if item == sample.item or stop - first > len(sample):
                continue
            other = self.store[item]
            try:
                return other, self._pixels(other)
            except DataError:
                continue  # broken too; it is told when its own turn comes
        return None


def _drop_of(sample: TokenizedSample, reason: str) -> Drop:
    """What is told of a sample whose picture cannot be read; its kind is the part of the reason before the colon."""
    source, record = (sample.source, sample.record) if isinstance(sample, StoredSample) else ("", 0)
    return Drop(source, record, "", f"{UNREADABLE}: {reason}")


def _origin_of(sample: TokenizedSample) -> tuple[str, int, int]:
    source, record = (sample.source, sample.record) if isinstance(sample, StoredSample) else ("", 0)
    return source, record, len(sample)


def labels_of(sample: TokenizedSample) -> NDArray[np.int64]:
    """int64[T]: the ids that are trained. The first token of a sample has no context, so it never is one."""
    labels = np.where(sample.loss_mask, sample.input_ids, IGNORE_INDEX).astype(np.int64)
    labels[:1] = IGNORE_INDEX
    return labels


def flat_batch(samples: Sequence[TokenizedSample]) -> Batch:
    """One row int64[1, T] of all samples; position ids restart at 0 with each."""
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    labels = np.concatenate([labels_of(sample) for sample in samples])
    positions = np.concatenate([np.arange(len(sample)) for sample in samples])
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
    }


def padded_batch(samples: Sequence[TokenizedSample], pad_id: int) -> Batch:
    """int64[B, T], padded right; the attention mask comes from lengths, because pad and eos may be one token."""
    shape = (len(samples), max(len(sample) for sample in samples))
    ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = sample.input_ids
        labels[row, : len(sample)] = labels_of(sample)
        mask[row, : len(sample)] = 1
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
    }

"""Samples to tensors. Images are opened here, in the DataLoader's workers, and nowhere earlier.

The `flat` layout is the rule: the samples of a batch follow one another in one row, position ids restart with each, and
nothing is padded. `padded` is for attention implementations that cannot keep samples of one row apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmft.errors import DataError
from mmft.images import open_image
from mmft.types import IGNORE_INDEX, Batch, Image, PackedSample, TokenizedSample

Layout = Literal["flat", "padded"]


class FeatureReader(Protocol):
    """Where cached features of images come from: float[N, P, Dv] for N images."""

    def read(self, images: Sequence[Image]) -> Tensor:
        """The features of some images, in their order."""
        ...


@dataclass(frozen=True)
class Collator:
    """A picklable collate function: a list of samples, packed or not, to a `Batch`."""

    layout: Layout
    pad_id: int = 0
    transform: Callable[[Any], Tensor] | None = None
    features: FeatureReader | None = None

    def __call__(self, items: Sequence[TokenizedSample | PackedSample]) -> Batch:
        """The batch of some samples. Raises `DataError` for an image that cannot be read."""
        samples = [s for item in items for s in (item.samples if isinstance(item, PackedSample) else (item,))]
        batch = flat_batch(samples) if self.layout == "flat" else padded_batch(samples, self.pad_id)
        images = [image for sample in samples for image in sample.images]
        if images and self.features is not None:
            batch["image_features"] = self.features.read(images)
        elif images:
            batch["pixel_values"] = torch.stack([self._pixels(image) for image in images])
        return batch

    def _pixels(self, image: Image) -> Tensor:
        """float32[3, H, W] of one picture; an error names it."""
        opened = open_image(image.source)
        assert self.transform is not None
        try:
            return self.transform(opened)
        except DataError as error:
            raise DataError(f"{image.source}: {error}") from error


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

"""Samples to tensors: what no context is given is never a label, and samples of one row stay countable apart."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor

from mmft.data.collate import Collator, flat_batch, labels_of, padded_batch
from mmft.errors import DataError
from mmft.types import IGNORE_INDEX, Image, PackedSample, TokenizedSample

X = IGNORE_INDEX


def sample(ids: list[int], loss: str, *images: str | Path) -> TokenizedSample:
    """`loss` is a string of `1` for a target and `.` for context."""
    mask = np.array([one == "1" for one in loss], dtype=np.bool_)
    return TokenizedSample(np.array(ids, dtype=np.int32), mask, tuple(map(Image, images)))


A, B = sample([5, 6, 7], ".11"), sample([8, 9], "11")


def test_labels_are_the_trained_ids_unshifted() -> None:
    assert labels_of(A).tolist() == [X, 6, 7]


def test_the_first_token_of_a_sample_is_never_a_label() -> None:
    assert labels_of(B).tolist() == [X, 9]
    assert flat_batch([B, B])["labels"].tolist() == [[X, 9, X, 9]]
    assert padded_batch([B, B], 0)["labels"].tolist() == [[X, 9], [X, 9]]


def test_a_flat_batch_is_one_row_in_which_positions_restart_with_each_sample() -> None:
    batch = flat_batch([A, B])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[X, 6, 7, X, 9]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}  # a mask would let samples see each other
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())  # type: ignore[attr-defined]


def test_a_padded_batch_is_padded_right() -> None:
    batch = padded_batch([B, A], 0)
    assert batch["input_ids"].tolist() == [[8, 9, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[X, 9, X], [X, 6, 7]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())  # type: ignore[attr-defined]


def test_where_pad_is_eos_the_eos_of_an_answer_is_still_seen_and_trained() -> None:
    eos = 2
    batch = padded_batch([sample([5, 6, eos], ".11"), sample([5, 6, 7, 8, eos], "..111")], eos)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[X, 6, eos, X, X], [X, X, 7, 8, eos]]


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_packed_rows_are_unpacked_into_their_samples(layout: Any) -> None:
    collate = Collator(layout)
    packed = collate([PackedSample((A, B)), PackedSample((A,))])
    plain = collate([A, B, A])
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[key], plain[key]) for key in plain)  # type: ignore[literal-required]


def mean_colour(picture: Pillow.Image) -> Tensor:
    """A transform: float32[3, 2, 2] of the picture's first pixel."""
    return torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32)[:, None, None].expand(3, 2, 2)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Pillow.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return paths


def test_pictures_are_stacked_in_reading_order_over_the_whole_batch(pictures: list[Path]) -> None:
    first = PackedSample((sample([1, 2], ".1", pictures[2]), sample([3], ".")))
    batch = Collator("flat", transform=mean_colour)([first, sample([4, 5], ".1", pictures[0], pictures[1])])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 0, 1]


def test_a_batch_of_text_has_no_pictures() -> None:
    assert "pixel_values" not in Collator("flat", transform=mean_colour)([A])


def test_a_picture_that_cannot_be_read_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        Collator("flat", transform=mean_colour)([sample([1, 2], ".1", tmp_path / "bad.png")])


class Numbers:
    """A feature cache whose features are the number in an image's name."""

    def read(self, images: Sequence[Image]) -> Tensor:
        return torch.tensor([[[float(Path(image.source).stem)]] for image in images])

    def check(self, images: Sequence[Image]) -> None:
        """All of them can be read."""


def test_cached_features_are_read_in_place_of_opening_pictures() -> None:
    batch = Collator("flat", features=Numbers())([sample([1], ".", "7.png"), sample([2], ".", "4.png", "5.png")])
    assert batch["image_features"].flatten().tolist() == [7, 4, 5] and "pixel_values" not in batch


def test_a_collator_goes_to_a_worker_process(pictures: list[Path]) -> None:
    collate = pickle.loads(pickle.dumps(Collator("padded", pad_id=3, transform=mean_colour)))
    assert collate([sample([1, 2], ".1", pictures[1])])["pixel_values"][0, 0, 0, 0] == 1

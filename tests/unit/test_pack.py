"""Packing: whole samples, nothing lost, no row over, and as full as best-fit decreasing makes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmft.data.pack import PackedStore, best_fit
from mmft.data.store import TokenStore
from mmft.errors import DataError
from mmft.types import Image, PackedSample

MAX = 100
LENGTHS = st.lists(st.integers(1, MAX), max_size=80)


def plain_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """Best-fit decreasing as textbooks have it, without any index: the free space of each row."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, space in enumerate(rows) if space >= length]
        if fitting:
            rows[min(fitting, key=lambda row: rows[row])] -= length
        else:
            rows.append(max_length - length)
    return rows


@given(LENGTHS)
def test_every_item_is_in_exactly_one_row(lengths: list[int]) -> None:
    rows = best_fit(lengths, MAX)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(rows)


@given(LENGTHS)
def test_no_row_is_longer_than_max_length(lengths: list[int]) -> None:
    assert all(sum(lengths[item] for item in row) <= MAX for row in best_fit(lengths, MAX))


@given(LENGTHS)
def test_rows_are_as_full_as_textbook_best_fit_makes_them(lengths: list[int]) -> None:
    free = sorted(MAX - sum(lengths[item] for item in row) for row in best_fit(lengths, MAX))
    assert free == sorted(plain_best_fit(lengths, MAX))


@given(LENGTHS)
def test_the_number_of_rows_keeps_the_proven_bound_of_best_fit_decreasing(lengths: list[int]) -> None:
    """11/9 of the optimum and 6/9 (Dósa 2007, for FFD and BFD); the optimum is at least the tokens over max_length."""
    large = sum(length > MAX / 2 for length in lengths)
    optimum_at_least = max(-(-sum(lengths) // MAX), large)
    rows = best_fit(lengths, MAX)
    assert len(rows) >= optimum_at_least
    if all(3 * length <= MAX for length in lengths) and rows:  # small items: every row but one is two thirds full
        fills = sorted(sum(lengths[item] for item in row) for row in rows)
        assert all(3 * fill > 2 * MAX for fill in fills[1:])


@given(LENGTHS)
@settings(max_examples=30)
def test_packing_depends_on_the_lengths_alone(lengths: list[int]) -> None:
    assert best_fit(lengths, MAX) == best_fit(np.array(lengths, dtype=np.int64), MAX)


def test_many_short_samples_fill_rows_almost_whole() -> None:
    lengths = np.random.default_rng(0).integers(5, 400, 5000)
    assert lengths.sum() / (len(best_fit(lengths, 2048)) * 2048) > 0.998


def test_one_sample_longer_than_a_row_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError, match="sample 1 has 101 tokens, more than max_length 100"):
        best_fit([5, 101], 100)


def store_of(lengths: list[int], images: list[list[str]] | None = None) -> TokenStore:
    """A store whose sample n consists of the id n."""
    return TokenStore(
        ids=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        loss=np.ones(sum(lengths), np.bool_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        images=images or [[] for _ in lengths],
        index=np.arange(len(lengths)),
        drops=(),
        num_records=len(lengths),
    )


def test_a_row_holds_whole_samples_with_their_images() -> None:
    store = store_of([6, 3, 4, 9], [["a.png"], [], ["b.png", "c.png"], []])
    packed = PackedStore.of(store, 10)
    assert len(packed) == 3 and sorted(packed.lengths.tolist()) == [3, 9, 10]
    full = packed[packed.lengths.tolist().index(10)]
    assert isinstance(full, PackedSample)
    assert [sample.input_ids.tolist() for sample in full.samples] == [[0] * 6, [2] * 4]
    assert [sample.images for sample in full.samples] == [
        (Image("a.png"),),
        (Image("b.png"), Image("c.png")),
    ]
    assert packed.has_image.tolist() == [length == 10 for length in packed.lengths]
    assert packed.summary() == "packed 4 samples into 3 rows of 10: 73.3% full"


def test_a_repeated_sample_is_packed_as_often_as_it_is_repeated() -> None:
    store = store_of([6, 4])
    repeated = TokenStore(**{**vars(store), "index": np.array([0, 1, 0, 1])})
    packed = PackedStore.of(repeated, 10)
    assert packed.lengths.tolist() == [10, 10]

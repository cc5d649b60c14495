"""Whole samples into rows of `max_length`, best fit first, images included.

A sample is never cut and never seen by its neighbours: position ids restart with each, and attention stays inside
(`mmft/modeling/attention.py`). Best-fit decreasing over the whole set, as in "Fewer Truncations Improve Language
Modeling" (https://arxiv.org/abs/2404.10830, section 3), but with nothing split.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmft.data.store import TokenStore
from mmft.errors import DataError
from mmft.types import PackedSample


def best_fit(lengths: Sequence[int] | NDArray[np.int64], max_length: int) -> list[list[int]]:
    """Rows of item numbers; the lengths of a row add up to at most `max_length`.

    Raises `DataError` where one item alone is longer.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free space -> rows that have it
    spaces: list[int] = []  # the keys of open_rows, sorted
    for item in order.tolist():
        length = int(lengths[item])
        if length > max_length:
            raise DataError(f"sample {item} has {length} tokens, more than max_length {max_length}")
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), max_length
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(item)
        left = space - length
        if left not in open_rows:
            open_rows[left] = []
            insort(spaces, left)
        open_rows[left].append(row)
    return rows


@dataclass(frozen=True)
class PackedStore:
    """A token store seen as packed rows."""

    store: TokenStore
    rows: list[list[int]]
    max_length: int

    @classmethod
    def of(cls, store: TokenStore, max_length: int) -> "PackedStore":
        """Pack every item of a store."""
        return cls(store, best_fit(store.lengths, max_length), max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> PackedSample:
        return PackedSample(tuple(self.store[item] for item in self.rows[row]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[R]: the tokens of each row."""
        lengths = self.store.lengths
        return np.array([lengths[row].sum() for row in self.rows], dtype=np.int64)

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """bool[R]: whether a row holds a picture."""
        has_image = self.store.has_image
        return np.array([has_image[row].any() for row in self.rows], dtype=np.bool_)

    def summary(self) -> str:
        """How full the rows are."""
        fill = float(self.lengths.sum()) / max(1, len(self) * self.max_length)
        return f"packed {len(self.store):,} samples into {len(self):,} rows of {self.max_length:,}: {fill:.1%} full"

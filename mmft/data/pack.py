"""Whole samples into rows of `max_length`, best fit first, images included.

A sample is never cut and never seen by its neighbours: position ids restart with each, and attention stays inside
(`mmft/modeling/attention.py`). Best-fit decreasing over the whole set, as in "Fewer Truncations Improve Language
Modeling" (https://arxiv.org/abs/2404.10830, section 3), but with nothing split.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mmft.data.mixing import Mixing
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
    """A token store seen as packed rows: int64[N] items, row after row, and int64[R + 1] where each row begins.

    Where an epoch takes shares of its datasets (`mixing`), a row holds samples of one dataset, and rows are drawn.
    """

    store: TokenStore
    items: NDArray[np.int64]
    starts: NDArray[np.int64]
    max_length: int
    mixing: Mixing | None = None

    @classmethod
    def of(cls, store: TokenStore, max_length: int) -> "PackedStore":
        """Pack every item of a store."""
        lengths = store.lengths
        rows: list[list[int]] = []
        sizes: list[int] = []
        first = 0
        for size in store.mixing.sizes if store.mixing else (len(store),):
            packed = best_fit(lengths[first : first + size], max_length)
            rows += [[first + item for item in row] for row in packed] if first else packed
            sizes.append(len(packed))
            first += size
        items = np.fromiter(chain.from_iterable(rows), np.int64, len(store))
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(store, items, starts, max_length, store.mixing.of_sizes(sizes) if store.mixing else None)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> PackedSample:
        number = range(len(self))[row]
        items = self.items[self.starts[number] : self.starts[number + 1]]
        return PackedSample(tuple(self.store[item] for item in items.tolist()))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[R]: the tokens of each row."""
        return self._sums(self.store.lengths)

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """bool[R]: whether a row holds a picture."""
        has_image: NDArray[np.bool_] = self._sums(self.store.has_image.astype(np.int64)) > 0
        return has_image

    def _sums(self, of_item: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[R]: the sum over each row; every row holds something."""
        sums: NDArray[np.int64] = np.add.reduceat(of_item[self.items], self.starts[:-1]) if len(self) else of_item
        return sums

    def summary(self) -> str:
        """How full the rows are."""
        fill = float(self.lengths.sum()) / max(1, len(self) * self.max_length)
        text = f"packed {len(self.store):,} samples into {len(self):,} rows of {self.max_length:,}: {fill:.1%} full"
        return text + (f"; {self.mixing.summary()}" if self.mixing else "")

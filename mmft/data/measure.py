"""Numbers about many samples at once: how long they are, and how many are there twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil

import numpy as np
from numpy.typing import NDArray

from mmft.data.store import TokenStore

MAX_BARS = 16
BLOCK = 4_000_000  # tokens hashed at a time, 32 MB an array
QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Histogram:
    """Lengths of samples. `bars` are (from, to, how many), both ends included; `quantiles` are lengths that occur."""

    unit: str
    quantiles: dict[str, int]
    mean: float
    bars: tuple[tuple[int, int, int], ...]


def histogram(lengths: Sequence[int] | NDArray[np.int64], unit: str) -> Histogram | None:
    """Bars of one round width up to the 99th percentile, one for all that is longer; None where there are no lengths.

    The percentiles are exact: the smallest length that this share of the samples does not exceed.
    """
    values = np.asarray(lengths, np.int64)
    if not len(values):
        return None
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    quantiles = dict(zip(QUANTILES, map(int, found), strict=True))
    low, high, longest = quantiles["min"], quantiles["p99"], quantiles["max"]
    width = _round_width((high - low + 1) / MAX_BARS)
    starts = list(range(low // width * width, high + 1, width))
    edges = np.array([*starts, starts[-1] + width, max(longest + 1, starts[-1] + width + 1)])
    counts = np.histogram(values, edges)[0].tolist()
    bars = [(int(a), int(b) - 1, n) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    if not bars[-1][2]:
        bars.pop()
    return Histogram(unit, quantiles, float(values.mean()), tuple(bars))


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below."""
    power = 1
    while power * 10 <= least:
        power *= 10
    return next(power * step for step in (1, 2, 5, 10) if power * step >= ceil(least))


@dataclass(frozen=True)
class Duplicates:
    """`num_extra` items are copies of an earlier one; `most` are (copies, first item) of the most frequent."""

    num_extra: int
    most: tuple[tuple[int, int], ...] = ()


def duplicates(hashes: Hashes, show: int = 3) -> Duplicates:
    """Which items are equal, by their hashes."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    order = several[np.lexsort((first[several], -counts[several]))][:show]
    most = tuple((int(counts[i]), int(first[i])) for i in order)
    return Duplicates(int(len(hashes) - len(first)), most)


def hash_samples(store: TokenStore) -> Hashes:
    """uint64[S]: a hash of each sample's token ids, in order, and of its image paths.

    Each (position, id) is mixed to 64 bits and the sum is taken, so a sample costs no Python. Two different samples
    meet with a chance of 2**-64: for a million samples one time in 37 million.
    """
    offsets = np.asarray(store.offsets)
    hashes = np.zeros(len(offsets) - 1, np.uint64)
    start = 0
    while start < len(hashes):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + BLOCK, "right")) - 1)
        bounds = offsets[start : stop + 1] - offsets[start]
        ids = np.asarray(store.ids[offsets[start] : offsets[stop]]).astype(np.uint64)
        position = np.arange(len(ids), dtype=np.uint64) - np.repeat(bounds[:-1], np.diff(bounds)).astype(np.uint64)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(ids | (position << np.uint64(32))))])
        hashes[start:stop] = sums[bounds[1:]] - sums[bounds[:-1]]
        start = stop
    for sample in range(len(hashes)):
        if images := store.images[sample]:
            hashes[sample] ^= hash_text("\0".join(map(str, images)))
    return hashes


def hash_records(store: TokenStore) -> Hashes:
    """uint64[K]: as `hash_samples`, one for each record: the pieces of a record in their order are one thing."""
    hashes, first = hash_samples(store), store.first_of_record
    if len(first) == len(hashes):
        return hashes
    place = np.arange(len(hashes)) - np.repeat(first, np.diff(first, append=len(hashes)))
    joined: Hashes = np.add.reduceat(_mix(hashes + place.astype(np.uint64)), first)
    return joined


def hash_text(text: str) -> np.uint64:
    """A hash that is the same in every process; lone surrogates are no obstacle."""
    return np.uint64(int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"))


def _mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

"""What preparing data leaves: all token ids in flat arrays, and a line for each record that is not trained as given."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import eq
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from mmft.data.mixing import Mixing
from mmft.types import Image, TokenizedSample

DROPPED, REPLACED, REPAIRED = "dropped", "replaced", "repaired"  # actions; beside them: truncated, split


@dataclass(frozen=True, slots=True)
class Drop:
    """A record that is not trained as it was given."""

    source: str
    record: int  # counted from 1, as a person counts lines
    id: str  # the record's own; of a record without one the file it is, where its source says so
    reason: str
    action: str = DROPPED

    def __str__(self) -> str:
        name = f' (id "{self.id}")' if self.id and self.id != self.source else ""
        if name and self.id.startswith(self.source):  # a file of the folder that is the source
            name = f" ({self.id})"
        return f"{self.source} record {self.record:,}{name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class StoredSample(TokenizedSample):
    """A sample that knows where it came from, so that an image found broken while training is named by its record."""

    source: str = ""
    record: int = 0  # counted from 1; 0 where it is not known
    item: int = -1  # its number in the store


class ImagePaths(Sequence[list[str]]):
    """The image paths of each sample, read from flat bytes: uint8[bytes], int64[I + 1] ends, int64[S + 1] first."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64], first: NDArray[np.int64]) -> None:
        self.text, self.ends, self.first = text, ends, first

    @classmethod
    def of(cls, paths: Iterable[Sequence[str]]) -> "ImagePaths":
        """From lists in memory."""
        listed = [list(one) for one in paths]
        encoded = [os.fsencode(path) for one in listed for path in one]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        first = np.cumsum([0, *map(len, listed)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends, first)

    def __len__(self) -> int:
        return len(self.first) - 1

    @overload
    def __getitem__(self, sample: int) -> list[str]: ...
    @overload
    def __getitem__(self, sample: slice) -> list[list[str]]: ...
    def __getitem__(self, sample: int | slice) -> list[str] | list[list[str]]:
        if isinstance(sample, slice):
            return [self[one] for one in range(*sample.indices(len(self)))]
        number = range(len(self))[sample]
        inside = range(int(self.first[number]), int(self.first[number + 1]))
        return [os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]].tobytes()) for i in inside]

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64[S]: the images of each sample."""
        return np.diff(self.first)


class DropList(Sequence[Drop]):
    """The drops of a store, read from its file line by line, never all in memory; `replaced` renames dropped ones."""

    def __init__(self, path: Path, number: int, *, replaced: bool = False) -> None:
        self.path, self.number, self.replaced = path, number, replaced

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Drop]:
        return (drop for _, drop in self.with_dataset())

    def with_dataset(self) -> Iterator[tuple[int, Drop]]:
        """(number of the dataset from 0, drop), in order."""
        if not self.number:
            return
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                dataset, *fields = json.loads(line)
                drop = Drop(*fields)
                yield dataset, replace(drop, action=REPLACED) if self.replaced and drop.action == DROPPED else drop

    @overload
    def __getitem__(self, item: int) -> Drop: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[Drop]: ...
    def __getitem__(self, item: int | slice) -> Drop | Sequence[Drop]:
        if isinstance(item, slice):
            wanted = range(*item.indices(len(self)))
            found = {i: drop for i, drop in zip(range(max(wanted, default=-1) + 1), self, strict=False) if i in wanted}
            return tuple(found[i] for i in wanted)
        return next(islice(self, range(len(self))[item], None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Origins:
    """Which dataset and which of its records each sample is from: int64[D + 1] first samples, int64[S] records."""

    sources: tuple[str, ...]
    first: NDArray[np.int64]
    records: NDArray[np.int64]

    def of(self, sample: int) -> tuple[str, int]:
        """(source, number of the record from 1) of a sample."""
        dataset = int(np.searchsorted(self.first, sample, side="right")) - 1
        return self.sources[dataset], int(self.records[sample])


@dataclass(frozen=True)
class TokenStore:
    """All samples of a run: flat arrays and where each sample starts. `index` repeats samples of repeated datasets.

    With `mixing`, the index has every sample once, dataset by dataset, and each epoch draws its own part of it.
    """

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    offsets: NDArray[np.int64]  # [S + 1]
    images: Sequence[list[str]]
    index: NDArray[np.int64]  # [N] sample numbers
    drops: Sequence[Drop]
    num_records: int
    trained: NDArray[np.int32] | None = None  # [S] targets of each sample; counted where it is not given
    origins: Origins | None = None
    mixing: Mixing | None = None
    held_out: NDArray[np.int64] | None = None  # sample numbers that are not in the index: they are for validation
    record_lengths: NDArray[np.int32] | None = None  # [R] tokens of each record, before any was cut or dropped

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> TokenizedSample:
        sample = int(self.index[item])
        start, stop = self.offsets[sample], self.offsets[sample + 1]
        images = tuple(Image(source) for source in self.images[sample])
        source, record = self.origins.of(sample) if self.origins else ("", 0)
        return StoredSample(self.ids[start:stop], self.loss[start:stop], images, source, record, item)

    def validation(self) -> "TokenStore":
        """What is held out, each sample once."""
        return replace(self, index=np.empty(0, np.int64) if self.held_out is None else self.held_out, mixing=None)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[N]: the tokens of each item."""
        lengths: NDArray[np.int64] = np.diff(self.offsets)[self.index]
        return lengths

    @property
    def image_counts(self) -> NDArray[np.int64]:
        """int64[S]: the images of each sample."""
        if isinstance(self.images, ImagePaths):
            return self.images.counts
        return np.fromiter(map(len, self.images), np.int64, len(self.images))

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """bool[N]: whether an item holds a picture."""
        has_image: NDArray[np.bool_] = (self.image_counts > 0)[self.index]
        return has_image

    @property
    def targets(self) -> NDArray[np.int64]:
        """int64[S]: the targets of each sample; its first token has no context and is none."""
        if self.trained is not None:
            return self.trained.astype(np.int64)
        counted = np.concatenate([[0], np.cumsum(self.loss, dtype=np.int64)])
        first = np.minimum(self.offsets[:-1] + 1, self.offsets[1:])
        targets: NDArray[np.int64] = counted[self.offsets[1:]] - counted[first]
        return targets

    @property
    def num_trained(self) -> int:
        """Tokens that are targets, repeats counted."""
        return int(self.targets[self.index].sum())

    @property
    def first_of_record(self) -> NDArray[np.int64]:
        """int64[K]: the first sample of each record that is kept; a record cut in pieces has several, one by one."""
        if self.origins is None or len(self.offsets) == 1:
            return np.arange(len(self.offsets) - 1)
        starts = np.diff(self.origins.records, prepend=-1) != 0
        starts[self.origins.first[:-1][self.origins.first[:-1] < len(starts)]] = True
        return np.flatnonzero(starts)

    def summary(self) -> str:
        """One paragraph a person reads before the run starts."""
        used = self.lengths
        text = (
            f"{len(self):,} samples, {int(used.sum()):,} tokens ({self.num_trained:,} trained), "
            f"{int(self.image_counts.sum()):,} images; longest {int(used.max(initial=0)):,} tokens"
        )
        held_out = 0 if self.held_out is None else len(self.held_out)
        text += f"; {held_out:,} samples beside them are held out for validation" if held_out else ""
        text += f"\n{self.mixing.summary()}" if self.mixing else ""
        return text + ("\n" + drop_summary(self.drops, self.num_records) if len(self.drops) else "")


_PLACE = re.compile(r"(\w+)\[\d+\]: ")


def drop_summary(drops: Iterable[Drop], num_records: int) -> str:
    """`dropped 12 of 665,298 records: 9 no assistant turn, 3 longer than 2048 tokens`."""
    counted: dict[str, Counter[str]] = {}
    for drop in drops:
        counted.setdefault(drop.action, Counter())[reason_kind(drop.reason)] += 1
    lines = []
    for action, reasons in sorted(counted.items()):
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        lines.append(f"{action} {reasons.total():,} of {num_records:,} records: {listed}")
    return "\n".join(lines)


def reason_kind(reason: str) -> str:
    """Reasons carry details after a colon; the kind is what stands before, and after a place such as `messages[3]`."""
    place = _PLACE.match(reason)
    return f"{place[1]}[]: {reason_kind(reason[place.end() :])}" if place else reason.partition(": ")[0]

"""The files of a token store: written chunk by chunk, read back memory-mapped.

ids.bin int32, loss.bin bool     of all samples, one after another
samples.npy int64[S, 4]          where each sample ends, its record, its targets, its images so far
lengths.npy int32[R]             the tokens of each record that was tokenised, before it was cut or dropped
paths.bin, path_ends.npy         all image paths in UTF-8, one after another
drops.jsonl                      a line for each record that is not trained as it was given
meta.json                        the samples of each dataset, and how many records and drops there are
"""

import json
import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmft.config import Data, Dataset
from mmft.data.holdout import held_out
from mmft.data.mixing import Mixing
from mmft.data.store import DROPPED, Drop, DropList, ImagePaths, Origins, TokenStore
from mmft.data.tokenize import TokenizedChunk

META = "meta.json"
LAYOUT = 2  # of these files; a store of another layout is not read


class StoreWriter:
    """Writes a store into an empty folder; memory does not grow with the tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids, self.loss = (folder / "ids.bin").open("wb"), (folder / "loss.bin").open("wb")
        self.paths = (folder / "paths.bin").open("wb")
        self.drops = (folder / "drops.jsonl").open("w", encoding="utf-8")
        self.samples: list[NDArray[np.int64]] = [np.zeros((1, 4), np.int64)]
        self.path_ends: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self.lengths: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
        self.counts: list[int] = []
        self.num_records = self.num_drops = 0

    def begin_dataset(self) -> None:
        """What is added from here on belongs to the next dataset."""
        self.counts.append(0)

    def add(
        self,
        chunk: TokenizedChunk,
        records: NDArray[np.int64],
        trained: NDArray[np.int64],
        drops: Iterable[Drop],
        lengths: NDArray[np.int64],
    ) -> None:
        """Samples with their record numbers and targets, what became of other records, and lengths before cutting."""
        self.lengths.append(lengths.astype(np.int32))
        chunk.ids.tofile(self.ids)
        chunk.loss.tofile(self.loss)
        rows = np.empty((len(chunk), 4), np.int64)
        rows[:, 0] = chunk.offsets[1:] + self.samples[-1][-1, 0]
        rows[:, 1], rows[:, 2] = records, trained
        rows[:, 3] = np.cumsum(np.fromiter(map(len, chunk.images), np.int64, len(chunk))) + self.samples[-1][-1, 3]
        if len(rows):
            self.samples.append(rows)
        paths = [os.fsencode(str(image.source)) for images in chunk.images for image in images]
        if paths:
            self.paths.write(b"".join(paths))
            self.path_ends.append(self.path_ends[-1][-1] + np.cumsum([len(path) for path in paths], dtype=np.int64))
        for drop in drops:
            fields = [len(self.counts) - 1, drop.source, drop.record, drop.id, drop.reason, drop.action]
            self.drops.write(json.dumps(fields) + "\n")  # in ASCII: a reason may quote half a character
            self.num_drops += 1
        self.counts[-1] += len(chunk)

    def finish(self) -> None:
        """Write what is known only at the end."""
        np.save(self.folder / "samples.npy", np.concatenate(self.samples))
        np.save(self.folder / "path_ends.npy", np.concatenate(self.path_ends))
        np.save(self.folder / "lengths.npy", np.concatenate(self.lengths))
        meta = {"counts": self.counts, "num_records": self.num_records, "num_drops": self.num_drops}
        (self.folder / META).write_text(json.dumps(meta), "utf-8")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self.ids, self.loss, self.paths, self.drops):
            file.close()


def open_store(folder: Path, data: Data, seed: int) -> TokenStore:
    """A store that was written, with the index that `repeat`, `weight` and `on_bad_sample` of the config ask for."""
    meta = json.loads((folder / META).read_text("utf-8"))
    samples = np.load(folder / "samples.npy", mmap_mode="r")
    offsets, image_ends = np.ascontiguousarray(samples[:, 0]), np.ascontiguousarray(samples[:, 3])
    path_ends = np.load(folder / "path_ends.npy")
    first = np.concatenate([[0], np.cumsum(meta["counts"])]).astype(np.int64)
    drops = DropList(folder / "drops.jsonl", meta["num_drops"], replaced=data.on_bad_sample == "replace")
    parts = [np.arange(first[i], first[i + 1]) for i in range(len(data.datasets))]
    share, records = data.validation_share, samples[1:, 1]
    held = [part[held_out(records[part], share, seed, number)] for number, part in enumerate(parts)]
    parts = [np.setdiff1d(part, out) for part, out in zip(parts, held, strict=True)] if share else parts
    if data.on_bad_sample == "replace":
        parts = _with_replacements(parts, folder, meta["num_drops"], seed)
    mixing = Mixing.of(data.datasets, [len(part) for part in parts])
    if mixing is None:
        parts = [np.tile(part, int(dataset.repeat)) for part, dataset in zip(parts, data.datasets, strict=True)]
    return TokenStore(
        ids=_mapped(folder / "ids.bin", np.int32, int(offsets[-1])),
        loss=_mapped(folder / "loss.bin", np.bool_, int(offsets[-1])),
        offsets=offsets,
        images=ImagePaths(_mapped(folder / "paths.bin", np.uint8, int(path_ends[-1])), path_ends, image_ends),
        index=np.concatenate(parts),
        drops=drops,
        num_records=meta["num_records"],
        trained=samples[1:, 2].astype(np.int32),
        origins=Origins(tuple(map(source_name, data.datasets)), first, np.ascontiguousarray(samples[1:, 1])),
        mixing=mixing,
        held_out=np.concatenate(held),
        record_lengths=np.load(folder / "lengths.npy"),
    )


def _with_replacements(
    parts: Sequence[NDArray[np.int64]], folder: Path, num_drops: int, seed: int
) -> list[NDArray[np.int64]]:
    """For each record that was dropped, a sample of its dataset chosen by a hash of seed, dataset and record."""
    more: list[list[int]] = [[] for _ in parts]
    for dataset, drop in DropList(folder / "drops.jsonl", num_drops).with_dataset():
        if drop.action == DROPPED and len(parts[dataset]):
            key = blake2b(f"{seed} {dataset} {drop.record}".encode(), digest_size=8).digest()
            more[dataset].append(int(parts[dataset][int.from_bytes(key) % len(parts[dataset])]))
    return [np.concatenate([part, np.array(add, np.int64)]) for part, add in zip(parts, more, strict=True)]


def _mapped(path: Path, dtype: Any, length: int) -> NDArray[Any]:
    """A file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.empty(0, dtype)


def source_name(dataset: Dataset) -> str:
    """What a dataset is called in messages: its path, else its source's name."""
    return str(dataset.source.options.get("path", dataset.source.name))

"""The streaming mode: records are read, tokenised and packed while training, and nothing is kept on disk.

The stream is cut into windows of `WINDOW` records. Which dataset the next record comes from, and the order of a
window's rows, are drawn from a generator seeded with (seed, window), so the whole order is a pure function of the seed
and the data. A position is the window, how many of its rows are consumed, and where each dataset stood when the window
began: to go on from it, each source is opened at that record (`DatasetSpec.load_from`) and one window is rebuilt.

Without weights a pass reads each dataset `repeat` times; a record is drawn from the datasets that have some left, as
often as they repeat, and no window crosses the end of a pass. With weights there are no passes: each dataset begins
anew whenever it ends. What is dropped travels with the first row of its window, so it is told once, resumed or not.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count, islice
from typing import TypeAlias

import numpy as np
import torch

from mmft.config import Data, Dataset
from mmft.data.dataset import SHOWN, TOO_LONG, tokenized_chunks
from mmft.data.files import source_name
from mmft.data.pack import best_fit
from mmft.data.records import bound_template, iterate_samples
from mmft.data.store import DROPPED, Drop, StoredSample
from mmft.data.tokenize import Tokenizer
from mmft.data.visible import one_line
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.types import PackedSample, RawRecord, Sample, TokenizedSample

WINDOW = 1000  # records that are tokenised, packed and shuffled together

Row: TypeAlias = TokenizedSample | PackedSample
Numbered: TypeAlias = tuple[int, RawRecord, Sample | str]
Cursor: TypeAlias = tuple[int, int]  # (times read to its end, records read since) of one dataset


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream stands: `row` rows are consumed of the window that begins at `cursors`, one for each dataset."""

    window: int
    row: int
    cursors: tuple[Cursor, ...]


@dataclass(frozen=True, slots=True)
class News:
    """What reading found since the last row: how many records were read, and which are not trained as given."""

    records: int = 0
    drops: tuple[Drop, ...] = ()

    def __add__(self, other: "News") -> "News":
        return News(self.records + other.records, self.drops + other.drops)

    @property
    def num_dropped(self) -> int:
        """Records that are not trained at all."""
        return sum(drop.action == DROPPED for drop in self.drops)


@dataclass(frozen=True, slots=True)
class StreamItem:
    """A row, the position after it, and what was found on the way to it."""

    sample: Row
    position: Position
    news: News


class SampleStream(torch.utils.data.IterableDataset[StreamItem]):
    """Rows without end, from `start` on.

    With several ranks each takes one row of every `world`; with several workers each takes whole batches of
    `batch_size`. Every process reads and tokenises the whole stream for that, so workers pay where images are opened.
    """

    def __init__(
        self,
        data: Data,
        plugins: Plugins,
        tokenizer: Tokenizer,
        *,
        seed: int,
        start: Position | None = None,
        window: int = WINDOW,
    ) -> None:
        super().__init__()
        self.data, self.plugins, self.tokenizer, self.seed, self.window = data, plugins, tokenizer, seed, window
        self.template = bound_template(data.chat_template, plugins, tokenizer)
        self.start = start or Position(0, 0, ((0, 0),) * len(data.datasets))
        self.weighted = any(dataset.weight is not None for dataset in data.datasets)
        self.batch_size, self.rank, self.world = 1, 0, 1

    def passes(self, cursors: Sequence[Cursor]) -> int:
        """How many times everything has been read: with weights, the dataset that was read least often decides."""
        return min(turn // self._turns(dataset) for (turn, _), dataset in zip(cursors, self.data.datasets, strict=True))

    def __iter__(self) -> Iterator[StreamItem]:
        worker = torch.utils.data.get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self._rows()
        for number in count():
            group = list(islice(rows, self.world))
            if number // self.batch_size % workers == mine:
                news = reduce(News.__add__, (item.news for item in group))
                yield StreamItem(group[self.rank].sample, group[-1].position, news)

    def _rows(self) -> Iterator[StreamItem]:
        """Every row, for all ranks and workers."""
        number, row = self.start.window, self.start.row
        readers = [_Reader(*pair, self.plugins) for pair in zip(self.data.datasets, self.start.cursors, strict=True)]
        news, last = News(), self.passes(self.start.cursors)
        while True:
            begun = tuple(reader.cursor for reader in readers)
            rows, found = self._read_window(number, readers)
            after = Position(number + 1, 0, tuple(reader.cursor for reader in readers))
            if row and row >= len(rows):
                raise DataError(
                    f"the data is not what it was at the checkpoint: window {number} had more than {row} rows, now "
                    f"{len(rows)}; restore the data, or start anew with --overwrite"
                )
            news = News() if row else news + found
            if rows:
                last = self.passes(after.cursors)
            else:
                self._refuse_endless_search(news, self.passes(after.cursors) - last)
            for index in range(row, len(rows)):
                ahead = Position(number, index + 1, begun) if index + 1 < len(rows) else after
                yield StreamItem(rows[index], ahead, news)
                news = News()
            number, row = number + 1, 0

    def _refuse_endless_search(self, news: News, passes: int) -> None:
        """Window after window without a row must not go on for ever."""
        if passes > 1 or news.num_dropped > self.data.max_bad_fraction * news.records:
            raise DataError(too_many(news.num_dropped, news.records, news.drops, self.data.max_bad_fraction))

    def _read_window(self, number: int, readers: Sequence["_Reader"]) -> tuple[list[Row], News]:
        """The rows of one window in their order, and what was found reading it; both may be empty."""
        random = np.random.default_rng([self.seed, number])
        chunks = self._draw(random, readers)
        drops: list[Drop] = []
        samples: list[TokenizedSample] = []
        for (index, turn), chunk in chunks.items():
            dataset = self.data.datasets[index]
            for fitted in tokenized_chunks(chunk, dataset, self.data, self.template, self.tokenizer):
                drops += [drop for drop in fitted.drops if drop.action == DROPPED or turn == 0]
                records = enumerate(fitted.records.tolist())
                samples += [_with_origin(fitted.samples[i], dataset, record) for i, record in records]
        self._refuse_bad(drops)
        rows: Sequence[Row] = samples
        if self.data.packing:
            packed = best_fit([len(sample) for sample in samples], self.data.max_length)
            rows = [PackedSample(tuple(samples[item] for item in row)) for row in packed]
        news = News(sum(map(len, chunks.values())), tuple(drops))
        return [rows[i] for i in random.permutation(len(rows)).tolist()], news

    def _refuse_bad(self, drops: Sequence[Drop]) -> None:
        """Stop at a bad record where the config says so; `too_long="drop"` is a choice, and no bad record."""
        for drop in drops if self.data.on_bad_sample == "error" else ():
            if drop.action == DROPPED and not drop.reason.startswith(TOO_LONG):
                raise DataError(f"{one_line(str(drop), SHOWN)} (data.on_bad_sample is 'error')")

    def _draw(self, random: np.random.Generator, readers: Sequence["_Reader"]) -> dict[tuple[int, int], list[Numbered]]:
        """(dataset, turn) -> its records of one window."""
        chunks: dict[tuple[int, int], list[Numbered]] = {}
        passes = self.passes([reader.cursor for reader in readers])
        left = self.window
        while left:
            shares = [self._share(reader, passes) for reader in readers]
            if not any(shares):
                break
            bounds = np.cumsum(shares)
            index = int(np.searchsorted(bounds[:-1], random.random() * bounds[-1], side="right"))
            key = (index, readers[index].turn)
            item = readers[index].read()
            if item is not None:
                chunks.setdefault(key, []).append(item)
                left -= 1
        return chunks

    def _share(self, reader: "_Reader", passes: int) -> float:
        """How often the next record comes from a dataset, relative to the others; 0 when its pass is over."""
        dataset = reader.dataset
        if self.weighted:
            return dataset.weight or 0.0
        turns = self._turns(dataset)
        return float(turns) if reader.turn < (passes + 1) * turns else 0.0

    def _turns(self, dataset: Dataset) -> int:
        return 1 if self.weighted else int(dataset.repeat)

    def shared(self, *, batch_size: int, rank: int, world: int) -> "SampleStream":
        """The same stream as one of `world` ranks sees it, in batches of `batch_size`."""
        stream = copy.copy(self)
        stream.batch_size, stream.rank, stream.world = batch_size, rank, world
        return stream


class _Reader:
    """One dataset, read again and again, from a cursor on."""

    def __init__(self, dataset: Dataset, cursor: Cursor, plugins: Plugins) -> None:
        self.dataset, self.plugins = dataset, plugins
        self.turn, self.record = cursor
        self._items: Iterator[Numbered] | None = None

    @property
    def cursor(self) -> Cursor:
        return self.turn, self.record

    def read(self) -> Numbered | None:
        """The next record; None where the dataset ends, and the next call begins it anew.

        Raises `DataError` for a dataset without records.
        """
        if self._items is None:
            self._items = iterate_samples(self.dataset, self.plugins, self.record)
        item = next(self._items, None)
        if item is not None:
            self.record = item[0]
            return item
        if self.record == 0:
            raise DataError(f"{source_name(self.dataset)} gives no records; drop the dataset, or give it some")
        self.turn, self.record, self._items = self.turn + 1, 0, None
        return None


def _with_origin(sample: TokenizedSample, dataset: Dataset, record: int) -> StoredSample:
    """The sample and where it came from, for an image that turns out to be broken."""
    return StoredSample(sample.input_ids, sample.loss_mask, sample.images, source_name(dataset), record)


def too_many(dropped: int, records: int, drops: Sequence[Drop], allowed: float) -> str:
    """Why a stream stops: one line with the first record that was dropped."""
    first = next((f"; the first: {one_line(str(drop), SHOWN)}" for drop in drops if drop.action == DROPPED), "")
    return (
        f"dropped {dropped:,} of the {records:,} records read; at most {allowed:.1%} is allowed "
        f"(data.max_bad_fraction){first}"
    )

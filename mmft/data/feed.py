"""A stream as a trainer takes it: batches that say where the stream stood after them, and the account of what was left
out.

The position travels with each batch, so that what a loader has read ahead does not count: a checkpoint holds the
position after the last batch that was trained on.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from mmft.data.collate import BAD_SAMPLES
from mmft.data.dataset import format_hints
from mmft.data.records import history_note
from mmft.data.store import Drop, drop_summary
from mmft.data.stream import News, Position, SampleStream, StreamItem, too_many
from mmft.errors import CheckpointError, DataError
from mmft.ranks import gathered, is_alone
from mmft.types import Batch

STATE = "stream.json"  # in a checkpoint, beside trainer_state.json
KEY = "stream"  # of a batch
SHOWN = 20  # drops that are kept for the report


@dataclass(frozen=True)
class StreamCollator:
    """Any collate function, with the position and the news of a batch beside its tensors."""

    collate: Callable[[Sequence[Any]], Batch]

    def __call__(self, items: Sequence[StreamItem]) -> dict[str, Any]:
        """The batch of some items, and under `KEY` a `StreamItem`'s position and news."""
        news = reduce(News.__add__, (item.news for item in items))
        return {**self.collate([item.sample for item in items]), KEY: (items[-1].position, news)}


class Account:
    """What a stream left out: counted, and written to dropped.jsonl, each record once.

    A checkpoint says how many lines were written when it was made. A run that goes on from it begins with those, so a
    record whose batch is trained on again is not listed again. Only the first pass lists what is trained, but not as it
    was given.
    """

    def __init__(
        self,
        path: Path,
        max_bad_fraction: float,
        report: Callable[[str], None],
        *,
        records: int = 0,
        dropped: int = 0,
        listed: int = 0,
    ) -> None:
        self.path, self.max_bad_fraction, self.report = path, max_bad_fraction, report
        self.records, self.dropped, self.listed = records, dropped, listed
        self.first: list[Drop] = []
        self.writes = False
        self._seen: set[tuple[str, int, str]] = set()

    def begin(self) -> None:
        """Write the list from here on, taken back to the checkpoint; of several ranks only the first does."""
        lines = self.path.read_text("utf-8").splitlines()[: self.listed] if self.listed and self.path.is_file() else []
        kept = [Drop(**json.loads(line)) for line in lines]
        self.first[:], self._seen = kept[:SHOWN], {(drop.source, drop.record, drop.reason) for drop in kept}
        self.path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        self.writes = True

    def take(self, news: News) -> None:
        """Add what a batch brought. Raises `DataError` when too many of the records read so far were dropped."""
        self.records += news.records
        self.dropped += news.num_dropped
        new = {(drop.source, drop.record, drop.reason): drop for drop in news.drops}
        new = {key: drop for key, drop in new.items() if key not in self._seen}
        if new:
            self._seen.update(new)
            self.listed += len(new)
            self.first += list(new.values())[: SHOWN - len(self.first)]
            if self.writes:
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in new.values())
                listed = drop_summary(tuple(new.values()), news.records or self.records).replace("\n", "; ")
                self.report(f"stream: {listed}; of {self.records:,} so far, {self.dropped:,} were dropped")
        if self.dropped > self.max_bad_fraction * self.records:
            raise DataError(too_many(self.dropped, self.records, self.first, self.max_bad_fraction))


@contextmanager
def _hints(stream: SampleStream) -> Iterator[None]:
    """A `DataError` raised inside also says which data map would fit."""
    try:
        yield
    except DataError as error:
        raise DataError("; ".join([str(error), *format_hints(stream.data, stream.plugins)])) from error


@dataclass(frozen=True, eq=False)
class _Hinting(torch.utils.data.IterableDataset[StreamItem]):
    """A stream with hints in its error: one of which all is dropped stops before any batch, in a worker perhaps."""

    stream: SampleStream

    def __iter__(self) -> Iterator[StreamItem]:
        with _hints(self.stream):
            yield from self.stream


class StreamFeed:
    """One run's stream: its loader, where it stands, and its account."""

    def __init__(self, stream: SampleStream, account: Account) -> None:
        self.stream, self.account, self.position = stream, account, stream.start
        self._unshared: list[Drop] = []  # pictures that this rank could not read

    @property
    def passes(self) -> int:
        """How many times everything has been trained on."""
        return self.stream.passes(self.position.cursors)

    @property
    def drops(self) -> Sequence[Drop]:
        """The first records that were left out; the list grows while the stream is read."""
        return self.account.first

    def summary(self) -> str:
        """One paragraph a person reads before the run starts."""
        where = "" if self.position.window == self.position.row == 0 else f", from row {self.position.row:,} of window "
        where += f"{self.position.window:,}" if where else ""
        note = history_note(self.stream.template)
        note = f"\n{note}" if note else ""
        number = len(self.stream.data.datasets)
        return f"streaming {number} dataset(s), {self.stream.window:,} records a window{where}{note}"

    def loader(
        self, collate: Callable[[Sequence[Any]], Batch], *, batch_size: int, rank: int, world: int, pin_memory: bool
    ) -> "torch.utils.data.DataLoader[StreamItem]":
        """The batches of one rank. Its generator is its own: starting it leaves torch's random state alone."""
        workers = self.stream.data.num_workers
        if rank == 0:
            self.account.begin()
        return torch.utils.data.DataLoader(
            _Hinting(self.stream.shared(batch_size=batch_size, rank=rank, world=world)),
            batch_size=batch_size,
            collate_fn=StreamCollator(collate),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # plugins cannot be pickled
            worker_init_fn=_one_thread_each,
            generator=torch.Generator().manual_seed(self.stream.seed),
            pin_memory=pin_memory,
        )

    def take(self, batch: dict[str, Any]) -> None:
        """Note that a batch is about to be trained on, and leave only tensors in it.

        Pictures that could not be read are of the same account: dropped.jsonl has one writer, which a resumed run can
        take back to its checkpoint.
        """
        self.position, news = batch.pop(KEY)
        self._unshared += batch.pop(BAD_SAMPLES, ())
        with _hints(self.stream):
            self.account.take(news)
        if is_alone():
            self.share()

    def share(self) -> None:
        """Put together the pictures that the ranks could not read; all of them call it at the same steps.

        What was read is the same news for each rank, so with this they know the same numbers and stop together.
        """
        found = tuple(drop for drops in gathered(self._unshared) for drop in drops)
        self._unshared = []
        if found:
            self.account.take(News(0, found))

    def save(self, folder: Path) -> None:
        """Write where the stream stands into a checkpoint, after `share`."""
        account = {name: getattr(self.account, name) for name in ("records", "dropped", "listed")}
        (folder / STATE).write_text(json.dumps({"position": asdict(self.position), "account": account}), "utf-8")


def read_state(checkpoint: Path) -> tuple[Position, dict[str, int]]:
    """The position and the account of a checkpoint. Raises `CheckpointError` where it has none."""
    try:
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
        position = state["position"]
        cursors = tuple((turn, record) for turn, record in position["cursors"])
        return Position(position["window"], position["row"], cursors), state["account"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: no position of a stream ({error}); start anew") from error


def _one_thread_each(worker: int) -> None:
    """In a worker: the tokenizer's threads do not survive the fork, and it says so unless told."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

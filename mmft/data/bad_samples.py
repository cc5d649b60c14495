"""The account of samples that turned out bad while training: told in dropped.jsonl, and too many stop the run."""

import json
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmft.data.collate import BAD_SAMPLES, UNREADABLE
from mmft.data.store import Drop
from mmft.errors import CheckpointError, DataError
from mmft.ranks import gathered, is_alone, is_first

STATE = "bad_samples.json"  # in a checkpoint, beside trainer_state.json
SEEN_BEFORE_JUDGING = 100  # samples; of fewer, one bad one would be too large a share


def drop_from(line: str) -> Drop:
    """A line of dropped.jsonl."""
    return Drop(**json.loads(line))


def found_while_training(drop: Drop) -> bool:
    """Whether a line of dropped.jsonl is from training and not from preparing the data."""
    return drop.reason.startswith(UNREADABLE)


class BadSamples:
    """Counts the samples of each batch, and those whose pictures could not be read, over all ranks and resumptions.

    A rank keeps what it found until `share`, which all of them call at the same steps: there they know the same
    numbers, so they stop together, and the first of them writes the list. A rank that is alone shares at once.
    """

    def __init__(self, path: Path, max_bad_fraction: float) -> None:
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.seen = self.bad = 0
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []  # a resumed run goes on with its list
        self.listed = {(drop.source, drop.record) for drop in map(drop_from, lines) if found_while_training(drop)}
        self.last: Drop | None = None
        self._unshared: tuple[int, list[Drop]] = (0, [])

    def take(self, batch: MutableMapping[str, Any]) -> None:
        """Take what is told of bad samples out of a batch, and count. Raises as `share`, where this rank is alone."""
        bad = batch.pop(BAD_SAMPLES, [])
        positions = batch.get("position_ids")
        samples = len(batch["input_ids"]) if positions is None else int((positions == 0).sum())
        self._unshared = self._unshared[0] + samples, [*self._unshared[1], *bad]
        if is_alone():
            self.share()

    def share(self) -> None:
        """Put together what the ranks found, list each record once.

        Raises `DataError` when more than `max_bad_fraction` of at least 100 samples seen were bad.
        """
        parts = gathered(self._unshared)
        self._unshared = (0, [])
        self.seen += sum(samples for samples, _ in parts)
        bad = [drop for _, drops in parts for drop in drops]
        if bad:
            self._tell(bad)
        if self.seen >= SEEN_BEFORE_JUDGING:
            self.judge()

    def judge(self) -> None:
        """Raise `DataError` when more than `max_bad_fraction` of the samples were bad; asked at the end too."""
        if self.bad > self.max_bad_fraction * self.seen:
            last = f"; the last: {self.last}" if self.last else ""
            raise DataError(
                f"{self.bad:,} of {self.seen:,} samples had an image that cannot be read; at most "
                f"{self.max_bad_fraction:.1%} is allowed (data.max_bad_fraction); they are listed in {self.path}{last}"
            )

    def save(self, folder: Path) -> None:
        """Write the counts into a checkpoint, after `share`."""
        (folder / STATE).write_text(json.dumps({"seen": self.seen, "bad": self.bad}), "utf-8")

    def load(self, checkpoint: Path) -> None:
        """Go on from the counts of a checkpoint. Raises `CheckpointError` where it has none."""
        try:
            state = json.loads((checkpoint / STATE).read_text("utf-8"))
            self.seen, self.bad = int(state["seen"]), int(state["bad"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint / STATE}: no counts of bad samples ({error}); start anew") from error

    def _tell(self, bad: Sequence[Drop]) -> None:
        self.bad += len(bad)
        self.last = bad[-1]
        new = {(drop.source, drop.record): drop for drop in bad if (drop.source, drop.record) not in self.listed}
        self.listed |= set(new)
        if is_first() and new:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in new.values())

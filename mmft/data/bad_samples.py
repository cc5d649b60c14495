"""The account of samples that turned out bad while training: told in dropped.jsonl, and too many stop the run."""

import json
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmft.data.collate import BAD_SAMPLES, UNREADABLE
from mmft.data.store import Drop
from mmft.errors import DataError

SEEN_BEFORE_JUDGING = 100  # samples; of fewer, one bad one would be too large a share


def drop_from(line: str) -> Drop:
    """A line of dropped.jsonl."""
    return Drop(**json.loads(line))


def found_while_training(drop: Drop) -> bool:
    """Whether a line of dropped.jsonl is from training and not from preparing the data."""
    return drop.reason.startswith(UNREADABLE)


class BadSamples:
    """Counts the samples of each batch, and those whose pictures could not be read."""

    def __init__(self, path: Path, max_bad_fraction: float) -> None:
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.seen = self.bad = 0
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []  # a resumed run goes on with its list
        self.listed = {(drop.source, drop.record) for drop in map(drop_from, lines) if found_while_training(drop)}
        self.last: Drop | None = None

    def take(self, batch: MutableMapping[str, Any]) -> None:
        """Take what is told of bad samples out of a batch, list each record once, and count.

        Raises `DataError` when more than `max_bad_fraction` of at least 100 samples seen were bad.
        """
        bad = batch.pop(BAD_SAMPLES, [])
        positions = batch.get("position_ids")
        self.seen += len(batch["input_ids"]) if positions is None else int((positions == 0).sum())
        if bad:
            self._tell(bad)
        if self.seen >= SEEN_BEFORE_JUDGING:
            self.judge()

    def judge(self) -> None:
        """Raise `DataError` when more than `max_bad_fraction` of the samples were bad; asked at the end too."""
        if self.bad > self.max_bad_fraction * self.seen:
            raise DataError(
                f"{self.bad:,} of {self.seen:,} samples had an image that cannot be read; at most "
                f"{self.max_bad_fraction:.1%} is allowed (data.max_bad_fraction); they are listed in {self.path}; "
                f"the last: {self.last}"
            )

    def _tell(self, bad: Sequence[Drop]) -> None:
        self.bad += len(bad)
        self.last = bad[-1]
        new = {(drop.source, drop.record): drop for drop in bad if (drop.source, drop.record) not in self.listed}
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in new.values())
        self.listed |= set(new)

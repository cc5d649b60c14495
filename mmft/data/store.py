"""What preparing data leaves: all token ids in flat arrays, and a line for each record that is not trained as given."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmft.types import Image, TokenizedSample


@dataclass(frozen=True, slots=True)
class Drop:
    """A record that is not trained as it was given."""

    source: str
    record: int  # counted from 1, as a person counts lines
    id: str
    reason: str
    action: str = "dropped"

    def __str__(self) -> str:
        name = f' (id "{self.id}")' if self.id else ""
        return f"{self.source} record {self.record:,}{name}: {self.reason}"


@dataclass(frozen=True)
class TokenStore:
    """All samples of a run: flat arrays and where each sample starts. `index` repeats samples of repeated datasets."""

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    offsets: NDArray[np.int64]  # [S + 1]
    images: list[list[str]]
    index: NDArray[np.int64]  # [N] sample numbers
    drops: tuple[Drop, ...]
    num_records: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> TokenizedSample:
        sample = int(self.index[item])
        start, stop = self.offsets[sample], self.offsets[sample + 1]
        images = tuple(Image(source) for source in self.images[sample])
        return TokenizedSample(self.ids[start:stop], self.loss[start:stop], images)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[N]: the tokens of each item."""
        lengths: NDArray[np.int64] = np.diff(self.offsets)[self.index]
        return lengths

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """bool[N]: whether an item holds a picture."""
        return np.array([bool(images) for images in self.images], dtype=np.bool_)[self.index]

    @property
    def num_trained(self) -> int:
        """Tokens that are targets, repeats counted."""
        if not len(self):
            return 0
        return int(np.add.reduceat(self.loss, self.offsets[:-1], dtype=np.int64)[self.index].sum())

    def summary(self) -> str:
        """One paragraph a person reads before the run starts."""
        used = self.lengths
        text = (
            f"{len(self):,} samples, {int(used.sum()):,} tokens ({self.num_trained:,} trained), "
            f"{sum(map(len, self.images)):,} images; longest {int(used.max(initial=0)):,} tokens"
        )
        return text + ("\n" + drop_summary(self.drops, self.num_records) if self.drops else "")


def drop_summary(drops: Sequence[Drop], num_records: int) -> str:
    """`dropped 12 of 665,298 records: 9 no assistant turn, 3 longer than 2048 tokens`."""
    lines = []
    for action in sorted({drop.action for drop in drops}):
        reasons = Counter(_reason_kind(drop.reason) for drop in drops if drop.action == action)
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        lines.append(f"{action} {reasons.total():,} of {num_records:,} records: {listed}")
    return "\n".join(lines)


def _reason_kind(reason: str) -> str:
    """Reasons carry details after a colon; the kind is what stands before."""
    return reason.partition(": ")[0]

"""How much of each dataset an epoch takes, and which part: a pure function of (seed, epoch).

Each dataset is an endless sequence of its own shuffles, one after another, and every epoch takes the next piece of it.
So a fraction of a dataset is another part each epoch, nothing comes a second time before everything came once, and a
whole number of repeats is exactly that many copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmft.config import Dataset


@dataclass(frozen=True)
class Mixing:
    """`sizes` are the items of each dataset, one dataset after the other; `quotas` how many of them an epoch takes."""

    datasets: tuple[Dataset, ...]
    sizes: tuple[int, ...]
    quotas: tuple[int, ...]

    @classmethod
    def of(cls, datasets: Sequence[Dataset], sizes: Sequence[int]) -> "Mixing | None":
        """What the datasets' `weight` or `repeat` ask for; None where whole copies of everything do.

        With weights an epoch has as many items as there are, shared out by weight; a dataset without items has none.
        """
        if all(dataset.weight is None and dataset.repeat == int(dataset.repeat) for dataset in datasets):
            return None
        shares = [dataset.weight or 0.0 for dataset in datasets]
        if any(shares):
            present = [share if size else 0.0 for share, size in zip(shares, sizes, strict=True)]
            quotas = _share_out(sum(sizes), present)
        else:
            quotas = [round(dataset.repeat * size) for dataset, size in zip(datasets, sizes, strict=True)]
        wanted = [max(1, quota) if size else 0 for quota, size in zip(quotas, sizes, strict=True)]
        return cls(tuple(datasets), tuple(sizes), tuple(wanted))

    def of_sizes(self, sizes: Sequence[int]) -> "Mixing":
        """The same mixing over other items of the same datasets: packed rows instead of samples."""
        mixing = Mixing.of(self.datasets, sizes)
        assert mixing is not None
        return mixing

    def draw(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """int64[sum(quotas)]: the item numbers of an epoch, dataset by dataset."""
        first, drawn = 0, [np.empty(0, np.int64)]
        for number, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            start, stop = epoch * quota, (epoch + 1) * quota
            for turn in range(start // max(1, size), -(-stop // max(1, size))):
                shuffled = np.random.default_rng([seed, number, turn]).permutation(size)
                drawn.append(first + shuffled[max(0, start - turn * size) : stop - turn * size])
            first += size
        return np.concatenate(drawn)

    def summary(self) -> str:
        """`an epoch takes 300 of 1,000 from a.json, 500 of 100 from b.json`."""
        listed = [
            f"{quota:,} of {size:,} from {dataset.source.options.get('path', dataset.source.name)}"
            for dataset, size, quota in zip(self.datasets, self.sizes, self.quotas, strict=True)
        ]
        return f"an epoch takes {', '.join(listed)}"


def _share_out(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the shares that add up to `total`: the largest remainders get what is left."""
    exact = [total * share / (sum(shares) or 1.0) for share in shares]
    whole = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole

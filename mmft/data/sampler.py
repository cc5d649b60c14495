"""The order of the data: a pure function of (seed, epoch), so a resumed run needs no replaying.

Grouping follows LLaVA's `group_by_modality_length` (haotian-liu/LLaVA @ c121f04, llava/train/llava_trainer.py): the
items of one optimizer step are of one modality and of similar length, and the steps are shuffled. The longest step
comes first, so that a batch that does not fit fails at once.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mmft.config import TrainConfig
from mmft.data.mixing import Mixing
from mmft.data.pack import PackedStore
from mmft.data.store import TokenStore

SORT_WINDOW = 50  # steps whose items are sorted together; larger is less random, smaller pads more


class StepSampler(torch.utils.data.Sampler[int]):
    """Item numbers such that every `step_size` consecutive ones (batch x ranks x accumulation) belong together."""

    def __init__(
        self,
        lengths: NDArray[np.int64],
        has_image: NDArray[np.bool_],
        step_size: int,
        *,
        seed: int,
        by_modality: bool = False,
        by_length: bool = False,
        mixing: Mixing | None = None,
    ) -> None:
        self.lengths, self.has_image, self.step_size, self.seed = lengths, has_image, step_size, seed
        self.by_modality, self.by_length, self.mixing = by_modality, by_length, mixing
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.mixing.quotas) if self.mixing else len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self.epoch).tolist()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """int64[N]: the whole order of one epoch: of every item, or of what `mixing` draws for it."""
        random = np.random.default_rng([self.seed, epoch])
        everything = random.permutation(len(self))
        if self.mixing:
            everything = self.mixing.draw(self.seed, epoch)[everything]
        if not (self.by_modality or self.by_length):
            return everything
        groups = [everything]
        if self.by_modality:
            groups = [everything[self.has_image[everything]], everything[~self.has_image[everything]]]
        steps, rest = [], []
        for group in groups:
            ordered = self._sorted_in_windows(group)
            whole = len(ordered) // self.step_size * self.step_size
            steps += list(ordered[:whole].reshape(-1, self.step_size))
            rest.append(ordered[whole:])
        left = np.concatenate(rest)  # what fills no step of its own modality shares one, and may be the longest
        whole = len(left) // self.step_size * self.step_size
        steps += list(left[:whole].reshape(-1, self.step_size))
        rest = [left[whole:]]
        order = random.permutation(len(steps)).tolist()
        if order:
            longest = max(order, key=lambda i: int(self.lengths[steps[i]].sum()))
            order.remove(longest)
            order.insert(0, longest)
        return np.concatenate([*(steps[i] for i in order), *rest])

    def _sorted_in_windows(self, group: NDArray[np.int64]) -> NDArray[np.int64]:
        window = self.step_size * max(1, min(SORT_WINDOW, len(group) // (4 * self.step_size)))
        if not self.by_length:
            window = self.step_size
        pieces = [group[start : start + window] for start in range(0, len(group), window)]
        pieces = [piece[np.argsort(-self.lengths[piece], kind="stable")] for piece in pieces]
        return np.concatenate(pieces) if pieces else group


def make_sampler(config: TrainConfig, dataset: TokenStore | PackedStore, world: int = 1) -> StepSampler:
    """The order in which `world` processes go through the samples, or the packed rows, of a config."""
    data, optim = config.data, config.optim
    return StepSampler(
        dataset.lengths, dataset.has_image, optim.batch_size_per_device * optim.accumulate * world,
        seed=config.runtime.seed, by_modality=data.group_by_modality, by_length=data.group_by_length,
        mixing=dataset.mixing,
    )  # fmt: skip


def describe_steps(sampler: StepSampler, batch_size: int, *, padded: bool | None = None) -> str:
    """The tokens of an optimizer step and what is padding, from the order of the first epoch.

    `padded` is whether batches are padded to their longest row; None where that is not known before the model is
    built: `batches of 1 x 4: 812 tokens a step on average (from 640 to 1,024); no padding`.
    """
    lengths = sampler.lengths[sampler.order(0)]
    steps = np.add.reduceat(lengths, np.arange(0, len(lengths), sampler.step_size))
    whole = steps[:-1] if len(lengths) % sampler.step_size and len(steps) > 1 else steps
    starts = np.arange(0, len(lengths), batch_size)
    widths = np.maximum.reduceat(lengths, starts) * np.diff(starts, append=len(lengths))
    share = 1 - float(lengths.sum()) / max(1, int(widths.sum()))
    if padded is False or batch_size == 1:
        padding = "no padding"
    elif padded:
        padding = f"{share:.1%} of a batch is padding"
    else:
        padding = f"no padding, or {share:.1%} of a batch where the model needs padded ones"
    return (
        f"batches of {batch_size} x {sampler.step_size // batch_size}: {float(whole.mean()):,.0f} tokens a step on "
        f"average (from {int(whole.min()):,} to {int(whole.max()):,}); {padding}"
    )

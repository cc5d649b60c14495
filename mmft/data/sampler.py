"""The order of the data: a pure function of (seed, epoch), so a resumed run needs no replaying.

Grouping follows LLaVA's `group_by_modality_length` (haotian-liu/LLaVA @ c121f04, llava/train/llava_trainer.py): the
items of one optimizer step are of one modality and of similar length, and the steps are shuffled. The longest step
comes first, so that a batch that does not fit fails at once.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mmft.data.mixing import Mixing

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

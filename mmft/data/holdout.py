"""Which records of the training data are held out for validation: a pure function of the seed and the records.

Whole records are chosen, so that the pieces of one record never stand on both sides.
"""

import numpy as np
from numpy.typing import NDArray

HOLDOUT = 0x686F6C64  # keeps these draws apart from the ones of the data order


def held_out(records: NDArray[np.int64], share: float, seed: int, dataset: int) -> NDArray[np.bool_]:
    """bool[S] of one dataset's samples, given int64[S] record numbers: True where the sample is for validation.

    `share` of the records, at least one; none of a dataset that has a single record. `dataset` is its number.
    """
    numbers = np.unique(records) if share else records[:0]
    if len(numbers) < 2:
        return np.zeros(len(records), np.bool_)
    count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
    chosen = np.random.default_rng([seed, dataset, HOLDOUT]).permutation(numbers)[:count]
    return np.isin(records, chosen)

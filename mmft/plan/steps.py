"""How many steps a run takes and what its largest batch is, from the token store, or from a sample of the records."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmft.config import Data, TrainConfig
from mmft.data.dataset import prepare
from mmft.data.digest import digest_of
from mmft.data.files import META, open_store
from mmft.data.pack import PackedStore
from mmft.data.records import bound_template, iterate_records
from mmft.data.sampler import StepSampler
from mmft.data.shape import Shape
from mmft.data.store import TokenStore
from mmft.plan.simulate import BatchShape
from mmft.plugins import Plugins

SAMPLE = 1000  # records of each dataset, where nothing is tokenised yet


@dataclass(frozen=True)
class Plan:
    """The data of a run as a trainer takes it. `scale` is all records over those that were looked at."""

    config: TrainConfig
    dataset: TokenStore | PackedStore
    scale: float
    source: str

    @property
    def store(self) -> TokenStore:
        """The samples, unpacked."""
        return self.dataset.store if isinstance(self.dataset, PackedStore) else self.dataset

    def sampler(self, step_size: int) -> StepSampler:
        """The order of an epoch, as in training."""
        data = self.config.data
        return StepSampler(
            self.dataset.lengths, self.dataset.has_image, step_size, seed=self.config.runtime.seed,
            by_modality=data.group_by_modality, by_length=data.group_by_length, mixing=self.dataset.mixing,
        )  # fmt: skip

    def steps_per_epoch(self, world: int = 1) -> int:
        """Optimizer steps, the last one perhaps short."""
        optim = self.config.optim
        items = round(len(self.sampler(1)) * self.scale)
        return ceil(ceil(items / (optim.batch_size_per_device * world)) / optim.accumulate)

    def steps(self, world: int = 1) -> int:
        """Optimizer steps of the run."""
        optim = self.config.optim
        return optim.max_steps or ceil(self.steps_per_epoch(world) * optim.epochs)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens, padding not counted."""
        order = self.sampler(1).order(0)
        return round(int(self.dataset.lengths[order].sum()) * self.scale)

    def largest(self, batch_size: int) -> list[NDArray[np.int64]]:
        """Items of the batch with the most tokens, and of that with the most targets where it is another one."""
        order = self.sampler(batch_size * self.config.optim.accumulate).order(0)
        starts = np.arange(0, len(order), batch_size)
        tokens = np.add.reduceat(self.dataset.lengths[order], starts)
        targets = np.add.reduceat(self._per_item(self._targets)[order], starts)
        numbers = dict.fromkeys([int(np.argmax(tokens)), int(np.argmax(targets))])
        return [order[number * batch_size : (number + 1) * batch_size] for number in numbers]

    def batches(self, batch_size: int) -> list[BatchShape]:
        """The shapes of the largest batches of this size."""
        return [self.shape_of(items) for items in self.largest(batch_size)]

    def shape_of(self, items: Sequence[int] | NDArray[np.int64]) -> BatchShape:
        """What memory depends on in a batch of these items."""
        dataset = self.dataset
        if isinstance(dataset, PackedStore):
            rows = [dataset.items[dataset.starts[i] : dataset.starts[i + 1]] for i in items]
            samples = np.concatenate(rows)
        else:
            samples = np.asarray(items)
        images = self.store.image_counts[self.store.index[samples]]
        lengths = tuple(map(int, self.store.lengths[samples]))
        return BatchShape(lengths, int(self._targets[samples].sum()), int(images.sum()))

    @property
    def _targets(self) -> NDArray[np.int64]:
        """int64[N]: the targets of each sample."""
        store = self.store
        trained: Any = store.trained
        if trained is None:
            trained = np.add.reduceat(store.loss, store.offsets[:-1], dtype=np.int64)
        targets: NDArray[np.int64] = np.asarray(trained, np.int64)[store.index]
        return targets

    def _per_item(self, of_sample: NDArray[np.int64]) -> NDArray[np.int64]:
        dataset = self.dataset
        if isinstance(dataset, PackedStore):
            return np.add.reduceat(of_sample[dataset.items], dataset.starts[:-1])
        return of_sample


def read_data(config: TrainConfig, plugins: Plugins, shape: Shape, *, whole: bool = False) -> Plan:
    """The token store where there is one, else one of the first records; `whole` tokenises all, as training does.

    Raises `DataError` as `prepare` does.
    """
    data, seed = config.data, config.runtime.seed
    cache = config.runtime.cache_dir or config.runtime.output_dir.parent / ".cache"
    template = bound_template(data.chat_template, plugins, shape.tokenizer)
    folder = cache / f"tokens-{digest_of(data, plugins, shape.tokenizer, template, cache)}"
    if not data.streaming and (whole or (folder / META).is_file()):
        store = (
            prepare(data, plugins, shape.tokenizer, cache, seed=seed) if whole else open_store(folder, data, seed)
        )  # fmt: skip
        return _plan(config, store, 1.0, f"token store {folder}")
    counts = [sum(1 for _ in iterate_records(dataset, plugins)) for dataset in data.datasets] if _counted(data) else []
    limited = [dataset.model_copy(update={"limit": min(SAMPLE, dataset.limit or SAMPLE)}) for dataset in data.datasets]
    with TemporaryDirectory() as temporary:
        store = prepare(
            data.model_copy(update={"datasets": tuple(limited), "on_bad_sample": "drop", "max_bad_fraction": 1.0}),
            plugins, shape.tokenizer, Path(temporary), seed=seed,
        )  # fmt: skip
        read = sum(min(SAMPLE, count) for count in counts) or store.num_records
        scale = sum(counts) / read if counts else 1.0
        what = f"the first {read:,} of {sum(counts):,} records" if scale > 1 else f"all {read:,} records, read now"
        if data.streaming:
            what = f"the first {read:,} records of the stream"
        return _plan(config, store, scale, what)


def _counted(data: Data) -> bool:
    """A stream may have no end."""
    return not data.streaming


def _plan(config: TrainConfig, store: TokenStore, scale: float, source: str) -> Plan:
    dataset = PackedStore.of(store, config.data.max_length) if config.data.packing else store
    return Plan(config, dataset, scale, source)

"""Whether the first records of each local data set are in the format its data map reads: part of `mmft check`."""

from collections.abc import Iterator, Sequence
from itertools import islice

from mmft.config import Dataset, TrainConfig
from mmft.data.formats import PROBED, format_hint, read_records, refusals
from mmft.errors import DataError, MmftError, Problem
from mmft.plugins import Plugins
from mmft.types import BadRecord


def format_problems(config: TrainConfig, plugins: Plugins, found: Sequence[Problem] = ()) -> Iterator[Problem]:
    """Data sets of which nothing could be trained, by their first records; `found` says which are wrong already.

    Only sources of plain files are read: no hub is asked, and no picture is written out of a table.
    """
    for part in ("datasets", "validation"):
        for index, dataset in enumerate(getattr(config.data, part)):
            where = f"data.{part}.{index}"
            known = any(f"{problem.where}.".startswith(f"{where}.") for problem in found)
            if not known and _is_cheap(dataset, plugins):
                yield from _problems(where, dataset, plugins)


def _is_cheap(dataset: Dataset, plugins: Plugins) -> bool:
    source = plugins.datasets.get(dataset.source.name)
    return bool(source.files and source.suffixes) and dataset.source.options.get("extract_to") is None


def _problems(where: str, dataset: Dataset, plugins: Plugins) -> Iterator[Problem]:
    path = dataset.source.options.get("path", "")
    more = f"see: mmft data check {path}" if isinstance(path, str) or hasattr(path, "suffix") else ""
    try:
        records = list(islice(read_records(dataset.source, plugins), PROBED))
    except DataError as error:
        yield Problem(f"{where}.source", str(error))
        return
    bad = [record for record in records if isinstance(record, BadRecord)]
    if len(bad) == len(records):
        what = f"none of the first {len(bad)} records can be read: {bad[0].reason}" if bad else f"{path} has no records"
        yield Problem(f"{where}.source", what, more if bad else "")
        return
    data_map = plugins.data_maps.get(dataset.data_map)
    refused = refusals(data_map, records)
    if refused and len(refused) == len(records) - len(bad):
        why = str(refused[0]) if isinstance(refused[0], MmftError) else f"{type(refused[0]).__name__}: {refused[0]}"
        what = f"{dataset.data_map!r} reads none of the first {len(refused)} records: {why}"
        yield Problem(f"{where}.data_map", what, format_hint(data_map, records, plugins) or more)

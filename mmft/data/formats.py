"""Which format a record is in: the columns a data map names are looked for, and the map is tried.

A column is a path: `messages[].role` is there where `messages` is a list and each of its items has `role`.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.specs import DataMap, DatasetSpec
from mmft.types import Document, RawRecord, Sample

PROBED = 20  # records of a file that are looked at
SOURCES: Mapping[str, str] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


def has_column(record: Any, path: str) -> bool:
    """Whether a record has the column of this path."""
    name, _, rest = path.partition(".")
    key = name.removesuffix("[]")
    if not isinstance(record, Mapping) or key not in record:
        return False
    value = record[key]
    if key == name:
        return has_column(value, rest) if rest else True
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(has_column(item, rest) for item in value) if rest else True


def looks_like(record: RawRecord, plugins: Plugins) -> list[tuple[DataMap, str]]:
    """The data maps whose columns a record has, best first, each with the reason: `it has messages[].role`."""
    return looks_like_all([record], plugins)


def looks_like_all(records: Iterable[RawRecord], plugins: Plugins) -> list[tuple[DataMap, str]]:
    """As `looks_like`, for the first records of a file together: a map counts where one of them has its columns.

    Best is what keeps most images, then what reads most of the records; then what adds no text of its own (a system
    text), what names most columns, what keeps most of the text. A map that is offered under several names comes first
    under that of its function.
    """
    probed = list(islice(records, PROBED))
    found = []
    for data_map in plugins.data_maps:
        if data_map.columns and any(all(has_column(one, path) for path in data_map.columns) for one in probed):
            reason = f"it has {', '.join(data_map.columns)}"
            found.append((_rank(data_map, probed), (data_map, reason)))
    return [fitting for _, fitting in sorted(found, key=lambda pair: pair[0])]


def _rank(data_map: DataMap, records: Sequence[RawRecord]) -> tuple[Any, ...]:
    """The sort key of `looks_like_all`: lower is better."""
    samples = [(record, sample) for record in records if (sample := _tried(data_map, record)) is not None]
    added = sum(_adds(sample, record) for record, sample in samples)
    kept = sum(_size(sample) for _, sample in samples)
    whole = sum(isinstance(sample, Document) for _, sample in samples)  # a conversation says more than its text alone
    eponymous = getattr(data_map.fn, "__name__", "") == data_map.name
    images = sum(0 if isinstance(sample, Document) else len(sample.images) for _, sample in samples)
    return -images, -len(samples), added > 0, whole, -len(data_map.columns), -kept, not eponymous, data_map.name


def _tried(data_map: DataMap, record: RawRecord) -> Sample | None:
    try:
        return data_map.fn(record)
    except Exception:  # a map that fails on a record does not fit it; why is not asked here
        return None


def _adds(sample: Sample, record: RawRecord) -> bool:
    """Whether the sample begins with a system text that is nowhere in the record."""
    if isinstance(sample, Document) or sample.messages[0].role != "system":
        return False
    return not any(sample.messages[0].text in text for text in _strings(record))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _size(sample: Sample) -> int:
    if isinstance(sample, Document):
        return len(sample.text)
    # what was understood as an image or a call outweighs the text that spells it
    return sum(len(one.text) + 1000 * (len(one.images) + len(one.tool_calls)) for one in sample.messages)


def format_hint(data_map: DataMap, records: Iterable[RawRecord], plugins: Plugins) -> str:
    """What to say beside the errors of a data map that refuses the first records of a file; empty where nothing fits.

    "this looks like `openai`: it has messages[].role" - or, where the map should fit, nothing.
    """
    probed = list(islice(records, PROBED))
    fitting = looks_like_all(probed, plugins)
    if not fitting:
        return ""
    best, reason = fitting[0]
    if best.fn is data_map.fn or not any(_tried(best, record) is not None for record in probed):
        return ""
    if all(_tried(data_map, record) is not None for record in probed):
        return ""
    return f"this looks like `{best.name}`: {reason}"


def formats_rows(plugins: Plugins) -> list[tuple[str, str, str]]:
    """(name, columns, summary) of every data map, sorted by name."""
    return [(data_map.name, ", ".join(data_map.columns), data_map.summary) for data_map in plugins.data_maps]


def source_of(file: Path, plugins: Plugins) -> DatasetSpec:
    """The data source that reads a file, by its suffix. Raises `DataError` for any other suffix."""
    name = SOURCES.get(file.suffix.lower())
    if name is None or name not in plugins.datasets.names():
        known = ", ".join(suffix for suffix, source in SOURCES.items() if source in plugins.datasets.names())
        raise DataError(f"{file}: a file of type {file.suffix or 'none'!r}; allowed: {known}")
    return plugins.datasets.get(name)


def read_file(file: Path, plugins: Plugins) -> Iterable[RawRecord]:
    """The records of a file, in order. Raises `DataError` for a file of another type."""
    return source_of(file, plugins).load(path=file)

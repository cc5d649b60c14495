"""Which format a record is in: the columns a data map names are looked for, and the map is tried.

A column is a path: `messages[].role` is there where `messages` is a list and each of its items has `role`.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from mmft.config import Use, use
from mmft.data.kinds import mapped, sound_records
from mmft.errors import AmbiguousName, DataError
from mmft.plugins import Plugins
from mmft.specs import DataMap, DatasetSpec
from mmft.types import BadRecord, Conversation, Document, RawRecord, Sample

PROBED = 20  # records of a file that the maps are tried on, and as many that fill other columns than those
LOOKED = 2000  # records among which such others are looked for


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


def looks_like_all(records: Iterable[RawRecord | BadRecord], plugins: Plugins) -> list[tuple[DataMap, str]]:
    """As `looks_like`, for some records of a file together (`probe`): a map counts where one has its columns.

    Best is what reads at least half of the records; then what keeps most images and tool calls, then what makes
    conversations; then what keeps most of the text of the records, those aside in which it finds nothing to train; then
    what adds no text of its own (a system text), and what names most columns. A map that is offered under several names
    comes first under that of its function.
    """
    probed = probe(records)
    found = []
    for data_map in plugins.data_maps:
        if data_map.columns and any(all(has_column(one, path) for path in data_map.columns) for one in probed):
            reason = f"it has {', '.join(data_map.columns)}"
            found.append((_rank(data_map, probed), (data_map, reason)))
    return [fitting for _, fitting in sorted(found, key=lambda pair: pair[0])]


def probe(records: Iterable[RawRecord | BadRecord]) -> list[RawRecord]:
    """The records a format is recognised by: the first, and those of the next ones that fill other columns.

    An error of the source behind the first record ends the looking; whoever reads the file meets it again.
    """
    first: list[RawRecord] = []
    others: list[RawRecord] = []
    shapes: set[frozenset[Any]] = set()
    try:
        for record in islice(records, LOOKED):
            if isinstance(record, BadRecord):
                continue
            shape = frozenset(key for key, value in record.items() if not _is_empty(value))
            if len(first) < PROBED:
                first.append(record)
            elif shape not in shapes and len(others) < PROBED:
                others.append(record)
            shapes.add(shape)
    except DataError:
        if not first:
            raise
    return first + others


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def _rank(data_map: DataMap, records: Sequence[RawRecord]) -> tuple[Any, ...]:
    """The sort key of `looks_like_all`: lower is better."""
    tried = [(record, _tried(data_map, record)) for record in records]
    refused = sum(isinstance(sample, Exception) for _, sample in tried)
    samples = [(record, sample) for record, sample in tried if isinstance(sample, Conversation | Document)]
    talks = [sample for _, sample in samples if isinstance(sample, Conversation)]
    shares = [_kept(sample, record) for record, sample in samples]
    share = sum(shares) / max(1, len(samples) + refused)
    added = any(_added(sample, record) for record, sample in samples)
    images = sum(len(talk.images) for talk in talks)
    calls = sum(len(talk.tools) + sum(len(one.tool_calls) for one in talk.messages) for talk in talks)
    eponymous = getattr(data_map.fn, "__name__", "") == data_map.name
    half = 2 * refused > len(records)
    whole = len(talks) < len(samples)  # a document: a conversation says more than its text alone
    return half, -images, -calls, whole, -share, added, -len(data_map.columns), not eponymous, data_map.name


def _tried(data_map: DataMap, record: RawRecord) -> Sample | Exception | None:
    """What a map makes of a record. None is no refusal: the map understood that there is nothing to train."""
    try:
        return mapped(data_map, record)
    except Exception as error:  # a map that fails on a record does not fit it; why is not asked here
        return error


def _reads(data_map: DataMap, record: RawRecord) -> bool:
    return isinstance(_tried(data_map, record), Conversation | Document)


def _added(sample: Sample, record: RawRecord) -> str:
    """The system text a sample begins with where it is nowhere in the record; else empty."""
    if isinstance(sample, Document) or not sample.messages or sample.messages[0].role != "system":
        return ""
    said = sample.messages[0].text
    return "" if any(said in text for text in _strings(record)) else said


def added_text(data_map: DataMap, records: Iterable[RawRecord]) -> str:
    """The system text that a map gives records which say none; empty where it gives none."""
    for record in records:
        sample = _tried(data_map, record)
        if isinstance(sample, Conversation) and (said := _added(sample, record)):
            return said.strip()
    return ""


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _kept(sample: Sample, record: RawRecord) -> float:
    """Which part of a record's text is in its sample, white space aside."""
    whole = sum(map(_length, _strings(record)))
    if isinstance(sample, Document):
        return min(1.0, _length(sample.text) / max(1, whole))
    kept = sum(_length(one.text) for one in sample.messages) - _length(_added(sample, record))
    return min(1.0, kept / max(1, whole))


def _length(text: str) -> int:
    return sum(map(len, text.split()))


def format_hint(data_map: DataMap, records: Iterable[RawRecord | BadRecord], plugins: Plugins) -> str:
    """What to say beside the errors of a data map that refuses the first records of a file; empty where nothing fits.

    "this looks like `openai`: it has messages[].role" - or, where the map should fit, nothing.
    """
    probed = probe(records)
    fitting = looks_like_all(probed, plugins)
    if not fitting:
        return ""
    best, reason = fitting[0]
    if best.fn is data_map.fn or not any(_reads(best, record) for record in probed):
        return ""
    if not any(isinstance(_tried(data_map, record), Exception) for record in probed):
        return ""
    return f"this looks like `{best.name}`: {reason}"


def refusals(data_map: DataMap, records: Iterable[RawRecord | BadRecord]) -> list[Exception]:
    """Why a map refuses records, one after the other; bad records and those that it understands are left out."""
    tried = (_tried(data_map, record) for record in records if not isinstance(record, BadRecord))
    return [error for error in tried if isinstance(error, Exception)]


def formats_rows(plugins: Plugins) -> list[tuple[str, str, str]]:
    """(name, columns, summary) of every data map, sorted by name."""
    return [(data_map.name, ", ".join(data_map.columns), data_map.summary) for data_map in plugins.data_maps]


def suffixes(plugins: Plugins) -> list[str]:
    """The file names that some data source is the usual one for, sorted."""
    return sorted({suffix for source in plugins.datasets for suffix in source.suffixes})


def reader_of(path: Path, plugins: Plugins) -> str | None:
    """What a config calls the data source that reads a file, by the longest suffix that fits; None where none does.

    Of a folder or a glob the files in it decide. The name is qualified where two plugins offer the short one. Raises
    `AmbiguousName` where two sources claim the suffix, or the files of a folder are those of several.
    """
    if not is_many(path):
        return _reader(path, plugins)
    names = Counter(name for file in files_of(path) if (name := _reader(file, plugins)))
    if len(names) > 1:
        found = ", ".join(f"{name} ({count:,})" for name, count in names.most_common())
        raise AmbiguousName(f"{path}: the files there are of several data sources: {found}; name one with --source")
    return next(iter(names), None)


def is_many(path: Path) -> bool:
    """Whether a path is a folder or a glob, which a file may be called too."""
    return path.is_dir() or (has_magic(str(path)) and not path.exists())


def files_of(path: Path) -> list[Path]:
    """The files of a folder, with its subfolders, or of a glob; hidden ones are left out, as the sources do."""
    if not path.is_dir():
        return [Path(match) for match in glob(str(path), recursive=True)]  # noqa: PTH207 - Path.glob takes no absolute pattern
    inside = (file for file in path.rglob("*") if file.is_file())
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _reader(file: Path, plugins: Plugins) -> str | None:
    claimed: dict[str, list[tuple[str, str]]] = {}
    for plugin in plugins.plugins:
        for source in plugin.offers.get("mmft_datasets", ()):
            for suffix in source.suffixes:
                if file.name.lower().endswith(suffix):
                    claimed.setdefault(suffix, []).append((plugin.name, source.name))
    if not claimed:
        return None
    suffix = max(claimed, key=len)
    if len(claimed[suffix]) > 1:
        choices = ", ".join(f"{plugin}/{name}" for plugin, name in sorted(claimed[suffix]))
        raise AmbiguousName(
            f"{file}: files {suffix!r} are read by {len(claimed[suffix])} data sources; name one of: {choices}"
        )
    ((plugin_name, name),) = claimed[suffix]
    return name if len(plugins.datasets.owners(name)) == 1 else f"{plugin_name}/{name}"


def source_use(path: Path, plugins: Plugins, name: str | None = None, options: Mapping[str, Any] | None = None) -> Use:
    """How a config would name the data source that reads a file, a folder or a glob, with its options.

    `name` is the source where the suffix does not tell. Raises `DataError` where no source reads it, where there is no
    such file, and for an option the source does not have; `AmbiguousName` as `reader_of`.
    """
    name = name or reader_of(path, plugins)
    if name is None and is_many(path):
        raise DataError(f"{path}: no file there that a data source reads; allowed: {', '.join(suffixes(plugins))}")
    if name is None:
        found = repr(path.suffix or path.name)
        raise DataError(
            f"{path}: no data source reads {found}; allowed: {', '.join(suffixes(plugins))}, or name the source with "
            f"--source: {', '.join(plugins.datasets.names())}"
        )
    spec = plugins.datasets.get(name)  # an unknown name is refused here, with what there is
    chosen = use(name, **{**(options or {}), "path": str(path)})
    try:
        inspect.signature(spec.load).bind(**chosen.options)
    except TypeError as error:
        known = ", ".join(one for one in inspect.signature(spec.load).parameters if one != "path")
        raise DataError(f"source {name!r}: {error}; options: {known or 'none'}") from error
    return chosen


def read_records(source: Use, plugins: Plugins) -> Iterable[RawRecord | BadRecord]:
    """The records of a source, in order."""
    spec = plugins.datasets.get(source.name)
    return sound_records(spec.name, spec.load(**source.options))


def source_of(path: Path, plugins: Plugins) -> DatasetSpec:
    """The data source that reads a file, by its suffix. Raises as `source_use`."""
    return plugins.datasets.get(source_use(path, plugins).name)


def format_of(path: Path, plugins: Plugins) -> list[tuple[DataMap, str]]:
    """As `looks_like_all`, of a file; at least one. Raises `DataError` where no format fits."""
    return recognise(source_use(path, plugins), plugins)[0]


def recognise(source: Use, plugins: Plugins) -> tuple[list[tuple[DataMap, str]], list[RawRecord]]:
    """As `looks_like_all`, of a source, at least one; and the records it was found by.

    Raises `DataError` where no format fits.
    """
    probed = probe(read_records(source, plugins))
    fitting = looks_like_all(probed, plugins)
    if not fitting:
        keys = ", ".join(map(repr, probed[0])) if probed else "none"
        where = source.options["path"]
        raise DataError(f"{where}: in no known format (keys of the first record: {keys}); see `mmft data formats`")
    return fitting, probed

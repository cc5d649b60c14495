"""Data sources: `json` and `jsonl` files, one or several, read in the order given.

A source yields objects as they stand in the file; what they mean is the data map's affair. UTF-8, with or without a
byte-order mark. Whatever is wrong with a file is a `DataError` that names the file and the place in it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import RawRecord
from mmft_plugins._records import keys_found, shown

Paths: TypeAlias = str | Path | Sequence[str | Path]


def files(path: Paths) -> list[Path]:
    """The files a source reads, in order. Raises `DataError` for an empty list."""
    given = [path] if isinstance(path, str | Path) else list(path)
    if not given:
        raise DataError("path: an empty list; give at least one file")
    return [Path(one).expanduser() for one in given]


def load_json(path: Paths) -> Iterator[RawRecord]:
    """The records of JSON files: each a list of objects, or an object holding exactly one list of objects.

    Raises `DataError` with the file, and the line or the number of the record (from 1).
    """
    return _load(path, _read_json)


def load_jsonl(path: Paths) -> Iterator[RawRecord]:
    """The records of JSON-lines files: one object a line; blank lines are skipped.

    Raises `DataError` with the file and the line (from 1).
    """
    return _load(path, _read_jsonl)


def _load(path: Paths, read: Callable[[Path], Iterable[tuple[str, Any]]]) -> Iterator[RawRecord]:
    for file in files(path):
        try:
            for place, record in read(file):
                if not isinstance(record, Mapping):
                    raise DataError(f"{file} {place}: {_kind(record)}, found {shown(record)}; a record is an object")
                yield record
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    records = _parse(_decode(file.read_bytes(), str(file)), str(file), "; a file of one object a line is 'jsonl'")
    if isinstance(records, dict):
        lists = [value for value in records.values() if _is_list_of_objects(value)]
        if len(lists) != 1:
            raise DataError(
                f"{file}: an object with {len(lists)} lists of objects (keys: {keys_found(records)}); "
                "allowed: a list of objects, or an object holding exactly one such list"
            )
        records = lists[0]
    if not isinstance(records, list):
        raise DataError(f"{file}: {_kind(records)}; allowed: a list of objects, or an object holding one such list")
    return ((f"record {number}", record) for number, record in enumerate(records, 1))


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"line {number}"
            text = _decode(line, f"{file} {place}")
            if text.strip():
                yield place, _parse(text, f"{file} {place}", "; a file that is one list is 'json'")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}: {error.reason}") from error


def _parse(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not JSON at {place}: {error.msg}{hint}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read") from error


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """The two file formats."""
    spec = partial(DatasetSpec, files=files)
    return [
        spec(name="json", load=load_json, summary="JSON files, each a list of objects"),
        spec(name="jsonl", load=load_jsonl, summary="JSON-lines files, one object a line"),
    ]

"""Data sources: `json` and `jsonl` files, streamed in the order given.

A source yields objects as they stand in the file; what they mean is the data map's affair. UTF-8, with or without a
byte-order mark. Whatever is wrong with a file is a `DataError` that names the file and the place in it. What JSON can
spell is passed on as it is: a NUL or a lone surrogate written as an escape, and a string of any length.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import RawRecord
from mmft_plugins._files import BLOCK, BOM, Paths, find_files, not_utf8, read_all, read_one
from mmft_plugins._json_stream import json_records

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def json_files(path: Paths, field: str | None = None) -> list[Path]:
    """The files `json` reads, in order; see `find_files`."""
    return find_files(path, (".json",))


def jsonl_files(path: Paths) -> list[Path]:
    """The files `jsonl` reads, in order; see `find_files`."""
    return find_files(path, (".jsonl", ".ndjson"))


def load_json(path: Paths, field: str | None = None) -> Iterator[RawRecord]:
    """The records of JSON files: each a list of objects, or an object holding exactly one list of objects.

    `field` names the list of an object that holds several. Memory does not grow with the file. Raises `DataError` with
    the file, and the line or the number of the record (from 1).
    """
    return read_all(json_files(path), partial(json_records, field=field))


def load_jsonl(path: Paths) -> Iterator[RawRecord]:
    """The records of JSON-lines files: one object a line; blank lines are skipped.

    Raises `DataError` with the file, the line (from 1) and the byte (from 0) where the line starts.
    """
    return read_all(jsonl_files(path), read_jsonl)


def load_jsonl_from(start: int, path: Paths) -> Iterator[RawRecord]:
    """What `load_jsonl` yields after the first `start` records; those are found by their offset and not parsed."""
    for file in jsonl_files(path):
        offset, line = 0, 1
        if start:
            try:
                offsets, lines = line_index(file)
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
            if 0 < len(offsets) <= start:
                start -= len(offsets)
                continue
            offset, line = (int(offsets[start]), int(lines[start])) if len(offsets) else (0, 1)
            start = 0
        yield from read_one(file, read_jsonl(file, offset, line))


def line_index(file: Path) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    """Where the records of a JSON-lines file are: int64[N] byte offset and int64[N] line number (from 1) of each.

    Reads the file once, without parsing; the arrays take 16 bytes a record.
    """
    import numpy as np

    ends, size = [], 0
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
            size += len(block)
        offsets = np.concatenate([np.zeros(1, np.int64), *(end + 1 for end in ends)]).astype(np.int64)
        offsets = offsets[offsets < size]
        keep = np.ones(len(offsets), np.bool_)
        lengths = np.diff(offsets, append=size)
        # A line that can be blank is one that does not begin with a brace: only those are looked at.
        for line, first in enumerate(_first_bytes(file, offsets)):
            if first != ord("{"):
                source.seek(offsets[line])
                keep[line] = bool(_content(source.read(int(lengths[line]))))
    return offsets[keep], np.flatnonzero(keep) + 1


def _first_bytes(file: Path, offsets: "NDArray[np.int64]") -> "NDArray[np.uint8]":
    """uint8[N], the byte at each offset."""
    import numpy as np

    if not len(offsets):
        return np.empty(0, np.uint8)
    return np.array(np.memmap(file, np.uint8, "r")[offsets])


def _content(line: bytes) -> bytes:
    return line.removeprefix(BOM).strip()


def read_jsonl(file: Path, offset: int = 0, line: int = 1) -> Iterator[tuple[str, Any]]:
    """(place, record) of a JSON-lines file from a byte offset on, at which the given line (from 1) starts."""
    empty = True
    with file.open("rb") as lines:
        lines.seek(offset)
        for number, data in enumerate(lines, line):
            if _content(data):
                empty = False
                yield f"line {number}", _parse_line(data, f"{file} line {number}", offset)
            offset += len(data)
    if empty:
        raise DataError(f"{file}: the file is empty; allowed: one object a line")


def _parse_line(line: bytes, where: str, offset: int) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.start + (len(BOM) if line.startswith(BOM) else 0)
        raise not_utf8(where, byte, error, f" of the line, {offset + byte} of the file") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "a file that is one list is 'json'"
        if not line.endswith(b"\n") and (error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")):
            hint = "the file ends inside this line: if it is cut off, copy or download it again"
        place = f"column {error.pos + 1}: {error.msg} (the line starts at byte {offset})"
        raise DataError(f"{where}: not JSON at {place}; {hint}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read") from error


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """The two file formats."""
    return [
        DatasetSpec(
            name="json", load=load_json, files=json_files, summary="JSON files, each a list of objects, streamed"
        ),
        DatasetSpec(
            name="jsonl",
            load=load_jsonl,
            files=jsonl_files,
            load_from=load_jsonl_from,
            summary="JSON-lines files, one object a line",
        ),
    ]

"""Data sources: `json` and `jsonl` files, streamed in the order given.

A source yields objects as they stand in the file; what they mean is the data map's affair. UTF-8, with or without a
byte-order mark. What JSON can spell is passed on as it is: a NUL or a lone surrogate written as an escape, and a string
of any length.

A line of `jsonl`, or an item of a `json` list, that is no record is a `BadRecord`: it is dropped and counted, and the
rest is read. A file that ends inside a record is a `DataError`: what was lost behind the cut nobody knows, so what
stands before it is not taken for the whole. So is a `json` file with a syntax error, which cannot be read on.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import BadRecord, RawRecord
from mmft_plugins._files import (
    BLOCK,
    BOM,
    NOT_UTF8,
    Paths,
    find_files,
    of_bytes,
    read_all,
    read_one,
    refuse_encoding,
)
from mmft_plugins._json_stream import is_cut_off, json_records
from mmft_plugins._records import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOT_JSON = "not JSON"  # as NOT_UTF8: the kind of a bad record
JSON, JSONL = (".json",), (".jsonl", ".ndjson")


def json_files(path: Paths, field: str | None = None) -> list[Path]:
    """The files `json` reads, in order; see `find_files`."""
    return find_files(path, JSON)


def jsonl_files(path: Paths) -> list[Path]:
    """The files `jsonl` reads, in order; see `find_files`."""
    return find_files(path, JSONL)


def load_json(path: Paths, field: str | None = None) -> Iterator[RawRecord | BadRecord]:
    """The records of JSON files: each a list of objects, or an object holding exactly one list of objects.

    `field` names the list of an object that holds several. Memory does not grow with the file. An item that is no
    object is a bad record. Raises `DataError` with the file and the line for a file that is not JSON.
    """
    return read_all(json_files(path), partial(json_records, field=field))


def load_jsonl(path: Paths) -> Iterator[RawRecord | BadRecord]:
    """The records of JSON-lines files: one object a line; blank lines are skipped.

    A line that is no object is a bad record, with its number (from 1) and the byte (from 0) where it starts. Raises
    `DataError` for a file that is empty, ends inside its last line, or is one JSON list.
    """
    return read_all(jsonl_files(path), read_jsonl)


def load_jsonl_from(start: int, path: Paths) -> Iterator[RawRecord | BadRecord]:
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
                if empty and line == 1:
                    refuse_encoding(file, data)
                record = _parse_line(data, file, number, offset)
                if empty and line == 1 and not isinstance(record, Mapping):
                    _refuse_json(file, _content(data), record)
                empty = False
                yield f"line {number}", record
            offset += len(data)
    if empty:
        raise DataError(f"{file}: the file is empty; allowed: one object a line")


def _parse_line(line: bytes, file: Path, number: int, offset: int) -> Any:
    """The value of a line, or why it has none as a `BadRecord`. Raises `DataError` where the file ends inside it."""
    where = f"{file.name} line {number}"
    last = not line.endswith(b"\n")
    try:
        text = line.rstrip(b"\r\n").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.start + (len(BOM) if line.startswith(BOM) else 0)
        if last and error.reason == "unexpected end of data":
            raise _cut_off(file, number, offset, "inside a character") from error
        place = f"byte {byte} of the line, {offset + byte} of the file"
        return BadRecord(f"{NOT_UTF8}: {where} at {place}: {of_bytes(error)}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if last and is_cut_off(text[error.pos :], error.msg):
            raise _cut_off(file, number, offset, error.msg) from error
        return BadRecord(
            f"{NOT_JSON}: {where} column {error.pos + 1}: {error.msg} (the line starts at byte {offset}); "
            "mend the line or delete it"
        )
    except RecursionError:
        return BadRecord(f"nested too deeply: {where} holds lists or objects in one another beyond what can be read")


def _cut_off(file: Path, line: int, offset: int, how: str) -> DataError:
    return DataError(
        f"{file} line {line}: the file ends inside this line, which starts at byte {offset}: {how}; what is missing "
        "is unknown: copy or download it again, or delete the line if what stands before it is all there is"
    )


def _refuse_json(file: Path, first: bytes, record: Any) -> None:
    """Raise `DataError` where a bad first line is one list, or begins a list or an object: all would be bad."""
    begins = isinstance(record, BadRecord) and first[:1] == b"[" and record.reason.startswith(NOT_JSON)
    is_all = isinstance(record, list) and any(isinstance(item, Mapping) for item in record)
    if begins or first == b"{" or (is_all and len(line_index(file)[0]) == 1):
        raise DataError(
            f"{file}: not one object a line: its first line is {shown(first.decode('utf-8', 'replace'))}; a file that "
            "is one list, or one object over several lines, is 'json': in a config use(\"json\", ...), for a file "
            "--source json"
        )


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """The two file formats."""
    return [
        DatasetSpec(
            name="json",
            load=load_json,
            files=json_files,
            summary="JSON files, each a list of objects, streamed",
            suffixes=JSON,
        ),
        DatasetSpec(
            name="jsonl",
            load=load_jsonl,
            files=jsonl_files,
            load_from=load_jsonl_from,
            summary="JSON-lines files, one object a line",
            suffixes=JSONL,
        ),
    ]

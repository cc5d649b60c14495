"""Files of records rewritten: repeated, with one text replaced by another, or in another format.

Each result is written beside its target and renamed when it is complete, so a failure leaves every file as it was.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mmft.config import Use
from mmft.data.formats import added_text, probe, read_records, recognise, source_use
from mmft.data.json_strings import Change, replaced
from mmft.data.kinds import mapped
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.types import BadRecord

WRITABLE = (".json", ".jsonl")
BLOCK = 1 << 20  # bytes of a file that are read at once
Report = Callable[[int], None]


@dataclass(slots=True)
class Converted:
    """What `convert` did: both formats, records written, and the dropped ones as (number from 1, reason).

    `adds` is a system text that the first format's map gave to records which say none.
    """

    source: str
    target: str
    written: int = 0
    drops: list[tuple[int, str]] = field(default_factory=list)
    repairs: int = 0
    adds: str = ""


def repeat(source: Path, target: Path, times: int, plugins: Plugins, report: Report = lambda _: None) -> int:
    """Write the records of a JSON or JSON-lines file `times` times over, the whole file each time; how many there are.

    `report` is called with 1 for each record. Raises `DataError` for a file of another type or an unreadable one.
    """
    if times < 1:
        raise DataError(f"-n {times}: it must be 1 or more")
    return write_records(target, _repeated(source, times, plugins), report)


def _repeated(source: Path, times: int, plugins: Plugins) -> Iterator[Mapping[str, Any]]:
    for _ in range(times):
        for record in read_records(source_use(source, plugins), plugins):
            if isinstance(record, BadRecord):
                raise DataError(record.reason)
            yield record


def write_records(target: Path, records: Iterable[Mapping[str, Any]], report: Report = lambda _: None) -> int:
    """Write records to a `.json` list or to `.jsonl`, one by one; how many were written."""
    lines = target.suffix.lower() == ".jsonl"
    if target.suffix.lower() not in WRITABLE:
        raise DataError(f"{target}: a file of type {target.suffix or 'none'!r}; allowed: {', '.join(WRITABLE)}")
    number = 0
    with _aside(target) as file:
        for number, record in enumerate(records, 1):
            before = "" if lines else ("[\n" if number == 1 else ",\n")
            file.write(f"{before}{_dumps(record)}{chr(10) if lines else ''}".encode())
            report(1)
        file.write(b"" if lines else (b"\n]\n" if number else b"[]\n"))
    return number


@contextmanager
def _aside(target: Path) -> Iterator[IO[bytes]]:
    """A file beside the target that takes its place on success and is removed on failure."""
    target = target.resolve()  # a link keeps pointing where it does
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _dumps(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
        return text
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8, but it has a JSON escape
        return json.dumps(value)
    except TypeError as error:
        raise DataError(f"a record holds what JSON cannot: {error}") from error


def json_files(paths: Iterable[Path]) -> list[Path]:
    """The JSON and JSON-lines files among the paths, folders searched to the bottom; each once, sorted in a folder."""
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in WRITABLE and one.is_file())
            found.update(dict.fromkeys(inside))
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        elif path.suffix.lower() not in WRITABLE:
            raise DataError(f"{path}: a file of type {path.suffix or 'none'!r}; allowed: {', '.join(WRITABLE)}")
        else:
            found[path] = None
    return list(found)


def replace(file: Path, old: str, new: str, *, in_keys: bool = False, report: Report = lambda _: None) -> int:
    """Replace a text in every string of a JSON or JSON-lines file; how many occurrences there were.

    Strings inside lists and objects at any depth, with `in_keys` the keys too. A file without the text is not written,
    and all but the strings that hold it stays as it is, byte for byte. `report` gets the bytes that were read.
    Raises `DataError` with the file and the line for what is not JSON; lines without the text are not looked into.
    """
    if not old:
        raise DataError("--old is empty; give the text to replace")
    change, again = Change(old, new, in_keys), Change(old, new, in_keys)
    pieces = _replaced_lines if file.suffix.lower() == ".jsonl" else _replaced_whole
    try:
        for _ in pieces(file, change, report):  # the first pass counts, so that nothing is written for nothing
            pass
        if change.count:
            with _aside(file) as out:
                out.writelines(pieces(file, again, lambda _: None))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    return change.count


def _replaced_lines(file: Path, change: Change, report: Report) -> Iterator[bytes]:
    """The lines of a JSON-lines file."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            report(len(line))
            may = line.strip() and change.may_be_in(line)
            yield b"".join(replaced([line], change, f"{file} line {number}")) if may else line


def _replaced_whole(file: Path, change: Change, report: Report) -> Iterator[bytes]:
    """A JSON file in blocks."""

    def blocks() -> Iterator[bytes]:
        with file.open("rb") as opened:
            while block := opened.read(BLOCK):
                report(len(block))
                yield block

    return replaced(blocks(), change, str(file))


def convert(
    source: Path | Use,
    target: Path,
    plugins: Plugins,
    *,
    to: str,
    origin: str = "",
    max_bad_fraction: float = 0.01,
    report: Report = lambda _: None,
) -> Converted:
    """Write the records of a file in another format: `DataMap.fn` of the one, `DataMap.write` of the other.

    `source` is a file, or a data source with its options. `origin` is the format of `source`, found from its first
    records where it is not given. A record that either map refuses is dropped with its reason. Raises `DataError` where
    nothing is left to write or more than `max_bad_fraction` are dropped; the target is then untouched.
    """
    into = plugins.data_maps.get(to)
    if into.write is None:
        writable = ", ".join(one.name for one in plugins.data_maps if one.write)
        raise DataError(f"--to {to}: this format is only read; formats that are written: {writable}")
    reading = source if isinstance(source, Use) else source_use(source, plugins)
    where = reading.options["path"]
    if origin:
        given, probed = plugins.data_maps.get(origin), probe(read_records(reading, plugins))
    else:
        ((given, _), *_), probed = recognise(reading, plugins)
    result = Converted(given.name, into.name, adds=added_text(given, probed))

    def records() -> Iterator[Mapping[str, Any]]:
        for number, record in enumerate(read_records(reading, plugins), 1):
            report(1)
            try:
                if isinstance(record, BadRecord):
                    raise DataError(record.reason)
                sample = mapped(given, record)
                if sample is None:
                    raise DataError("nothing to train")
                assert into.write is not None
                written = into.write(sample)
            except Exception as error:  # a map is somebody's code: whatever it raises belongs to the record
                result.drops.append((number, str(error) if isinstance(error, DataError) else repr(error)))
                continue
            result.repairs += bool(getattr(sample, "notes", ()))
            result.written += 1
            yield written
        if not result.written:
            raise DataError(f"{where}: nothing to write as {to!r}; {_first(result) or 'the file has no records'}")
        all_records = result.written + len(result.drops)
        if len(result.drops) > max_bad_fraction * all_records:
            raise DataError(
                f"{where}: {len(result.drops):,} of {all_records:,} records ({len(result.drops) / all_records:.1%}) "
                f"cannot be converted from {given.name!r} to {into.name!r}; at most {max_bad_fraction:.1%} is allowed "
                f"(--max-bad-fraction), so {target} is not written. The first: {_first(result)}"
            )

    write_records(target, records())
    return result


def _first(result: Converted) -> str:
    return "; ".join(f"record {number:,}: {reason}" for number, reason in result.drops[:3])

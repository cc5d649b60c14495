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

from mmft.data.formats import looks_like_all, read_file
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.specs import DataMap

WRITABLE = (".json", ".jsonl")
Report = Callable[[int], None]


@dataclass(slots=True)
class Converted:
    """What `convert` did: both formats, records written, and the dropped ones as (number from 1, reason)."""

    source: str
    target: str
    written: int = 0
    drops: list[tuple[int, str]] = field(default_factory=list)
    repairs: int = 0


def repeat(source: Path, target: Path, times: int, plugins: Plugins, report: Report = lambda _: None) -> int:
    """Write the records of a JSON or JSON-lines file `times` times over, the whole file each time; how many there are.

    `report` is called with 1 for each record. Raises `DataError` for a file of another type or an unreadable one.
    """
    if times < 1:
        raise DataError(f"-n {times}: it must be 1 or more")
    return write_records(target, _repeated(source, times, plugins), report)


def _repeated(source: Path, times: int, plugins: Plugins) -> Iterator[Mapping[str, Any]]:
    for _ in range(times):
        yield from read_file(source, plugins)


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


def _dumps(value: Any, indent: int | str | None = None) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        text.encode()
        return text
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8, but it has a JSON escape
        return json.dumps(value, indent=indent)
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
    and in JSON lines a line without it stays as it is, byte for byte. `report` gets the bytes that were read.
    Raises `DataError` with the file and the line for what is not JSON; lines without the text are not looked into.
    """
    if not old:
        raise DataError("--old is empty; give the text to replace")
    change = _Change(old, new, in_keys)
    if file.suffix.lower() == ".jsonl":
        count = sum(
            _replaced_lines(file, change, report)
        )  # the first pass counts, so that nothing is written for nothing
        if count:
            with _aside(file) as out:
                for _ in _replaced_lines(file, _Change(old, new, in_keys), lambda _: None, out):
                    pass
        return count
    raw = _read(file)
    report(len(raw))
    value = change.apply(_loads(raw, str(file)))
    if change.count:
        with _aside(file) as out:
            out.write((_dumps(value, _indent(raw)) + ("\n" if raw.endswith(b"\n") else "")).encode())
    return change.count


def _replaced_lines(file: Path, change: "_Change", report: Report, out: IO[bytes] | None = None) -> Iterator[int]:
    """The occurrences in each line of a JSON-lines file, and the lines themselves to `out`."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                before = change.count
                written = line
                if line.strip() and change.may_be_in(line):
                    value = change.apply(_loads(line, f"{file} line {number}"))
                    if change.count > before:
                        ending = line[len(line.rstrip(b"\r\n")) :]
                        written = _dumps(value).encode() + ending
                if out is not None:
                    out.write(written)
                report(len(line))
                yield change.count - before
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


class _Change:
    """One text for another inside JSON values, counted."""

    def __init__(self, old: str, new: str, in_keys: bool) -> None:
        self.old, self.new, self.in_keys, self.count = old, new, in_keys, 0
        self._bytes = old.encode("utf-8", "surrogatepass")

    def may_be_in(self, line: bytes) -> bool:
        """Whether a line must be parsed: without escapes a text stands in it as it is."""
        return b"\\" in line or self._bytes in line

    def apply(self, value: Any) -> Any:
        """The value with every occurrence replaced."""
        if isinstance(value, str):
            self.count += (found := value.count(self.old))
            return value.replace(self.old, self.new) if found else value
        if isinstance(value, list):
            return [self.apply(item) for item in value]
        if isinstance(value, dict):
            changed = {(self.apply(key) if self.in_keys else key): self.apply(item) for key, item in value.items()}
            if len(changed) < len(value):
                raise DataError(
                    f"replacing {self.old!r} in the keys {', '.join(map(repr, value))} makes two keys equal"
                )
            return changed
        return value


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def _loads(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _indent(raw: bytes) -> str | None:
    """The indentation of a JSON file's second line."""
    second = raw.split(b"\n", 2)[1:2]
    if not second or not second[0].strip():
        return None
    line = second[0].decode("utf-8", "replace")
    return line[: len(line) - len(line.lstrip())] or None


def convert(
    source: Path, target: Path, plugins: Plugins, *, to: str, origin: str = "", report: Report = lambda _: None
) -> Converted:
    """Write the records of a file in another format: `DataMap.fn` of the one, `DataMap.write` of the other.

    `origin` is the format of `source`, found from its first records where it is not given. A record that either map
    refuses is dropped with its reason. Raises `DataError` where nothing is left to write; the target is then untouched.
    """
    into = plugins.data_maps.get(to)
    if into.write is None:
        writable = ", ".join(one.name for one in plugins.data_maps if one.write)
        raise DataError(f"--to {to}: this format is only read; formats that are written: {writable}")
    given = plugins.data_maps.get(origin) if origin else detect(source, plugins)
    result = Converted(given.name, into.name)

    def records() -> Iterator[Mapping[str, Any]]:
        for number, record in enumerate(read_file(source, plugins), 1):
            report(1)
            try:
                sample = given.fn(record)
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
            first = "; ".join(f"record {number}: {reason}" for number, reason in result.drops[:3])
            raise DataError(f"{source}: nothing to write as {to!r}; {first or 'the file has no records'}")

    write_records(target, records())
    return result


def detect(file: Path, plugins: Plugins) -> DataMap:
    """The format of a file, from its first records. Raises `DataError` where none fits."""
    fitting = looks_like_all(read_file(file, plugins), plugins)
    if not fitting:
        first = next(iter(read_file(file, plugins)), {})
        keys = ", ".join(map(repr, first)) or "none"
        raise DataError(f"{file}: in no known format (keys of the first record: {keys}); see `mmft data formats`")
    return fitting[0][0]

"""The files of a source: found, read in a fixed order, and every trouble with one named.

All file sources share this: `path` is a file, a folder, a glob, or a list of these. Text is UTF-8, with or without a
byte-order mark; nothing is guessed, because a wrong guess trains on rubbish without a word.
"""

import codecs
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from mmft.errors import DataError
from mmft.types import BadRecord, RawRecord
from mmft_plugins._encodings import encoding_of, remedy_of
from mmft_plugins._records import shown

Paths: TypeAlias = str | Path | Sequence[str | Path]

BLOCK = 1 << 20  # bytes read at a time: large enough for speed, small beside a model
BOM = codecs.BOM_UTF8
START = 64  # bytes that are enough to see that a file is something else than its name says
POINTER = b"version https://git-lfs.github.com/spec/"  # how the file begins that Git LFS leaves in the place of another
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip", b"\xfd7zXZ\0": "xz", b"BZh91AY": "bzip2"}
UNPACK = {"gzip": "gunzip", "zstd": "unzstd", "zip": "unzip", "xz": "unxz", "bzip2": "bunzip2"}
NO_OBJECT, NOT_UTF8 = "not an object", "not UTF-8"  # the kinds of bad records: what stands before the colon
_KINDS = {list: "a list", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}


def find_files(path: Paths, suffixes: Sequence[str]) -> list[Path]:
    """The files of `path`, in the order given; what a folder (with its subfolders) or a glob holds is sorted by name.

    A folder gives the files that end in one of `suffixes`; files and folders that start with a dot are left out.
    A name without wildcards is kept although no such file exists: whoever opens it says so.
    Raises `DataError` for an empty list, a remote address, and a folder or glob that gives no file.
    """
    given = [path] if isinstance(path, str | Path) else list(path)
    if not given:
        raise DataError("path: an empty list; give at least one file")
    return [file for one in given for file in _expand(Path(one).expanduser(), str(one), suffixes)]


def _expand(path: Path, given: str, suffixes: Sequence[str]) -> list[Path]:
    if "://" in given:
        raise DataError(f"path: {given} is a remote address; only local files are read: download it first")
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.lower().endswith(tuple(suffixes)) and file.is_file()]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found:
            raise DataError(f"path: the folder {given} holds no file that ends in {' or '.join(suffixes)}")
        return sorted(found)
    if path.exists() or not has_magic(str(path)):  # a file may really be called a[1].json
        return [path]
    matches = glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = [Path(match) for match in matches if Path(match).is_file()]
    if not found:
        raise DataError(f"path: no file matches {given}")
    return sorted(found)


def read_all(
    found: Sequence[Path], read: Callable[[Path], Iterable[tuple[str, Any]]]
) -> Iterator[RawRecord | BadRecord]:
    """The records of all files, in order. `read` gives (place, record) of one file.

    A record that is no object is a bad one. Raises `DataError` where a file cannot be read.
    """
    for file in found:
        yield from read_one(file, read(file))


def read_one(file: Path, records: Iterable[tuple[str, Any]]) -> Iterator[RawRecord | BadRecord]:
    """The records of one file, of which (place, record) are given; see `read_all`."""
    try:
        for place, record in records:
            if isinstance(record, Mapping | BadRecord):
                yield record
            else:
                found = f"{kind(record)}, found {shown(record)}"
                yield BadRecord(f"{NO_OBJECT}: {file.name} {place} is {found}; a record is an object {{...}}")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def text_blocks(file: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of at most `BLOCK` characters, without its byte-order mark.

    Raises `DataError` with the line and the byte (from 0) that is not UTF-8, and as `refuse_stand_in`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, line = 0, 1
    with file.open("rb") as source:
        while True:
            block = source.read(BLOCK)
            if read == 0:
                refuse_stand_in(file, block)
                read = len(BOM) if block.startswith(BOM) else 0
                block = block.removeprefix(BOM)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise not_utf8(f"{file} line {line}", read - pending + error.start, error) from error
            read += len(block)
            line += text.count("\n")
            if text:
                yield text
            if not block:
                return


def not_utf8(where: str, byte: int, error: UnicodeDecodeError) -> DataError:
    """The error for bytes that are not UTF-8."""
    return DataError(f"{where}: {NOT_UTF8} at byte {byte}: {of_bytes(error)}")


def of_bytes(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not UTF-8, and the remedy, by the lines from that place on."""
    data = error.object
    lines = data if encoding_of(data) else data[data.rfind(b"\n", 0, error.start) + 1 :]
    return f"{error.reason} (found {data[error.start]:#04x}); {remedy_of(lines)}"


def first_bytes(file: Path) -> bytes:
    """What `refuse_pointer` and its like look at."""
    with file.open("rb") as opened:
        return opened.read(START)


def refuse_pointer(file: Path, start: bytes) -> None:
    """Raise `DataError` for what a clone without Git LFS has in the place of a large file."""
    if start.startswith(POINTER):
        raise DataError(f"{file}: not the file itself: a Git LFS pointer to it; fetch it with: git lfs pull")


def refuse_stand_in(file: Path, start: bytes) -> None:
    """Raise `DataError` where a file says by its first bytes that it is compressed, and as `refuse_pointer`."""
    refuse_pointer(file, start)
    packed = next((name for mark, name in PACKED.items() if start.startswith(mark)), None)
    if packed:
        raise DataError(f"{file}: compressed with {packed}; unpack it first, for example with {UNPACK[packed]}")


def refuse_encoding(file: Path, start: bytes) -> None:
    """Raise `DataError` where it is of another Unicode encoding by its first bytes, and as `refuse_stand_in`."""
    refuse_stand_in(file, start)
    if encoding := encoding_of(start):
        raise DataError(
            f"{file} line 1: {NOT_UTF8}: it holds the byte {start[0]:#04x}, with which {encoding} begins; "
            f"convert it: iconv -f {encoding} -t UTF-8"
        )


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), "a number")


def optional_package(name: str, extra: str, source: str) -> ModuleType:
    """A package that only one source needs. Raises `DataError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _not_installed(name, extra, source) from error


def check_installed(name: str, extra: str, source: str) -> None:
    """Raise the error of `optional_package` without importing anything, so that a config check is quick."""
    try:
        found = importlib.util.find_spec(name)
    except ImportError:
        found = None
    if found is None:
        raise _not_installed(name, extra, source)


def _not_installed(name: str, extra: str, source: str) -> DataError:
    package = name.partition(".")[0]
    return DataError(f"source {source!r} needs the package {package!r}, which is missing: pip install 'mmft[{extra}]'")

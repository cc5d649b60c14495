"""Pictures that a row holds as bytes, written to a folder once, so that the record holds their paths.

mmft opens pictures by path. Hugging Face's `datasets` keeps them as `{"bytes", "path"}`
(https://huggingface.co/docs/datasets/image_load), others as plain bytes; both are found however deep they lie in a row.
The bytes go to the file as they are, under the sha256 of their contents: a picture that occurs twice is one file, and
whoever reads the rows again, from wherever, gets the same paths.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmft.errors import DataError
from mmft.types import BadRecord, RawRecord

NO_PICTURE = "bytes that are no picture"  # the kind of a bad record: what stands before the colon
FIELDS = {"bytes", "path"}  # how `datasets` writes a picture
# How the files begin of the formats that `mmft.images.FORMATS` names, by the suffix they get.
STARTS: Mapping[str, re.Pattern[bytes]] = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpg": re.compile(rb"\xff\xd8\xff"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
    "bmp": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),  # two letters alone say little
    "tiff": re.compile(rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]"),
    "ppm": re.compile(rb"P[1-6]\s(?:\s|#[^\n]*\n)*\d+\s(?:\s|#[^\n]*\n)*\d+\s"),
    "avif": re.compile(rb"....ftyp(?:avif|avis|(?:mif1|msf1).{4}(?:.{4})*?avi[fs])", re.DOTALL),
}
_HEAD = 64  # bytes that are enough for all but a PPM with a long comment


def picture_suffix(data: bytes) -> str | None:
    """The suffix of the format that these bytes begin as; None where they are no picture that mmft opens."""
    head = data[:4096] if data[:1] == b"P" else data[:_HEAD]
    return next((suffix for suffix, start in STARTS.items() if start.match(head)), None)


def with_paths(rows: Iterable[tuple[str, RawRecord]], extract_to: str | Path | None) -> Iterator[RawRecord | BadRecord]:
    """The rows, of which (place, record) are given, with a path where a picture's bytes are.

    A `{"bytes", "path"}` without bytes becomes its path. Bytes that are no picture make the row a bad record.
    Raises `DataError` where there is a picture and `extract_to` is None (other bytes are passed on then), and where the
    folder cannot be written.
    """
    folder = None if extract_to is None else Path(extract_to).expanduser().resolve()
    for place, row in rows:
        record: RawRecord | BadRecord = row
        if any(isinstance(value, bytes | dict | list) for value in row.values()):
            try:
                record = {name: _placed(value, folder, f"{place} {name!r}") for name, value in row.items()}
            except _NoPicture as error:
                record = BadRecord(str(error))
        yield record


class _NoPicture(Exception):
    """Bytes that are not written to a file; the message is the reason."""


def _placed(value: Any, folder: Path | None, where: str) -> Any:
    """A value of a row with a path in the place of each picture."""
    if isinstance(value, bytes):
        return _saved(value, value, folder, where)
    if isinstance(value, list):
        return [item if isinstance(item, str) else _placed(item, folder, where) for item in value]
    if isinstance(value, dict):
        if value.keys() == FIELDS:
            data, path = value["bytes"], value["path"]
            if isinstance(data, bytes):
                return _saved(data, value, folder, where)
            if data is None and isinstance(path, str | None):
                return path
        return {key: item if isinstance(item, str) else _placed(item, folder, where) for key, item in value.items()}
    return value


def _saved(data: bytes, given: Any, folder: Path | None, where: str) -> Any:
    """The path of the file that holds these bytes, which is written first where it is not there yet."""
    suffix = picture_suffix(data)
    if folder is None:
        if suffix is None:
            return given
        raise DataError(
            f"{where} holds a picture as bytes, and pictures are opened by path; give the source "
            "extract_to='a folder', and they are written there once, or leave the column out with columns=[...]"
        )
    if suffix is None:
        found = f"{len(data)} bytes" + (f" that begin {data[:12]!r}" if data else "")
        raise _NoPicture(
            f"{NO_PICTURE}: {where} holds {found}; allowed are {', '.join(STARTS)}; "
            "leave a column of other bytes out with columns=[...] of the source"
        )
    digest = hashlib.sha256(data).hexdigest()[:32]
    file = folder / digest[:2] / f"{digest}.{suffix}"  # 256 folders: a million files in one are slow to list
    try:
        if not _is_whole(file, len(data)):
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, data)
    except OSError as error:
        raise DataError(f"extract_to: {file} cannot be written: {error.strerror or error}") from error
    return str(file)


def _is_whole(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size  # a machine that lost its power may leave an empty file behind
    except FileNotFoundError:
        return False


def _write(file: Path, data: bytes) -> None:
    """Under a name of its own first: several processes may write the same picture, and none may read half of it."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)

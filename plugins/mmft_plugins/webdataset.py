"""Data source: `webdataset`, tar shards of images with their texts.

The files of one sample follow one another and share their name up to its first dot, as in
https://github.com/webdataset/webdataset. mmft opens images by path, so each shard is unpacked once: its images and a
`records.jsonl` go to a folder under `extract_to`, and later runs read that folder. A shard that changes is unpacked
again, into another folder.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import BadRecord, RawRecord
from mmft_plugins._files import (
    NO_OBJECT,
    NOT_UTF8,
    PACKED,
    Paths,
    find_files,
    first_bytes,
    kind,
    of_bytes,
    refuse_pointer,
)
from mmft_plugins.sources import NOT_JSON, load_jsonl, load_jsonl_from

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("txt", "text", "caption")
RECORDS, FOLDER = "records.jsonl", "images"
LARGEST_TEXT = 64 << 20  # bytes of one text of a sample; more is not a caption
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def webdataset_files(path: Paths, extract_to: str | Path | None = None) -> list[Path]:
    """The shards, in order; `{000..010}` in a name stands for the numbers, otherwise see `find_files`.

    Raises `DataError` where `extract_to` is missing.
    """
    if extract_to is None:
        raise DataError("extract_to is missing; name a folder that the images of the shards are unpacked to, once")
    given = [path] if isinstance(path, str | Path) else list(path)
    return find_files([name for one in given for name in _numbered(str(one))], SUFFIXES)


def _numbered(path: str) -> list[str]:
    parts = _RANGE.split(path)  # text, first, last, text, first, last, ..., text
    if len(parts) == 1:
        return [path]
    ranges = list(zip(parts[1::3], parts[2::3], strict=True))
    numbers = product(*([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)] for first, last in ranges))
    found = [
        "".join([parts[0], *(n + text for n, text in zip(chosen, parts[3::3], strict=True))]) for chosen in numbers
    ]
    if not found:
        raise DataError(f"path: {path} counts down; give the smaller number first")
    return found


def load_webdataset(path: Paths, extract_to: str | Path | None = None) -> Iterator[RawRecord | BadRecord]:
    """The samples of the shards, in order, as `{"__key__", "image", "caption", ...}`.

    `image` is the path of the unpacked image, or a list of paths in the shard's order where a sample has several;
    `caption` is what a `.txt` holds, `cls` the number in a `.cls`, and the keys of a `.json` object stand beside them
    (an image or text file wins over a key of the same name). Files of other kinds are named under `__skipped__`.
    A sample whose text, number or object cannot be read is a bad record. Raises `DataError` for a damaged shard, and
    for a member that is a link or whose name leads out of the folder.
    """
    return load_webdataset_from(0, path, extract_to)


def load_webdataset_from(
    start: int, path: Paths, extract_to: str | Path | None = None
) -> Iterator[RawRecord | BadRecord]:
    """What `load_webdataset` yields after the first `start` samples; shards are unpacked, their records not read."""
    for shard in webdataset_files(path, extract_to):
        folder = unpacked(shard, Path(extract_to or "").expanduser().resolve())
        samples = int((folder / "samples").read_text("ascii"))
        if start < samples:
            records = load_jsonl_from(start, folder / RECORDS) if start else load_jsonl(folder / RECORDS)
            yield from (_with_paths(line, folder / FOLDER) for line in records)
        start = max(0, start - samples)


def _with_paths(line: RawRecord | BadRecord, folder: Path) -> RawRecord | BadRecord:
    if isinstance(line, BadRecord):
        return line
    if "bad" in line:
        return BadRecord(line["bad"])
    images = [str(folder / name) for name in line["images"]]
    return {**line["sample"], "image": images[0] if len(images) == 1 else images} if images else line["sample"]


def unpacked(shard: Path, extract_to: Path) -> Path:
    """The folder of a shard's images and records, which is filled first where it is not there yet."""
    try:
        state = shard.stat()
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error
    try:
        digest = hashlib.sha256(f"{shard.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
        folder = extract_to / f"{shard.name.partition('.')[0]}-{digest}"
        if folder.is_dir():
            return folder
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / FOLDER).mkdir(parents=True)
        try:
            _unpack(shard, temporary)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process of this run was quicker
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{shard}: damaged or cut off: {error}; copy or download it again") from error
    except OSError as error:
        raise DataError(f"{shard}: cannot be unpacked to {extract_to}: {error.strerror or error}") from error


def _unpack(shard: Path, folder: Path) -> None:
    samples = 0
    start = first_bytes(shard)
    refuse_pointer(shard, start)
    gzipped = PACKED.get(start[:2]) == "gzip"
    with (
        tarfile.open(shard, "r:gz" if gzipped else "r:") as tar,
        (folder / RECORDS).open("w", encoding="utf-8") as records,
    ):
        for record in _samples(shard, tar, folder / FOLDER):
            records.write(json.dumps(record) + "\n")  # ASCII: a lone surrogate of a .json stays an escape
            samples += 1
        # Python's tarfile takes a header that is cut off for the end of the archive.
        fileobj: Any = tar.fileobj
        fileobj.seek(tar.offset)
        if fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the mark at its end is missing")
    (folder / "samples").write_text(str(samples), "ascii")


def _samples(shard: Path, tar: tarfile.TarFile, folder: Path) -> Iterator[dict[str, Any]]:
    """The samples of one shard as {"images", "sample"} or {"bad"}, their images written to the folder."""
    done: set[str] = set()
    sample: dict[str, Any] = {}
    for member in tar:
        name = _safe_name(shard, member)
        if name is None:
            continue
        before, _, extension = name.name.partition(".")
        key = (name.parent / before).as_posix()
        if sample and key != sample["__key__"]:
            done.add(sample["__key__"])
            yield _finished(sample)
            sample = {}
        if key in done:
            raise DataError(
                f"{shard} {member.name}: the files of sample {key!r} do not follow one another; sort the shard"
            )
        sample.setdefault("__key__", key)
        file = tar.extractfile(member)
        assert file is not None  # a plain file has contents
        try:
            _add(sample, extension.lower(), name, file, folder, f"{shard} {member.name}")
        except _BadMember as error:
            reason, found = error.args
            sample.setdefault("__bad__", f"{reason}: {shard.name} {member.name}{found}")
    if sample:
        yield _finished(sample)


class _BadMember(Exception):
    """A member that cannot be read, while those after it can: the kind of trouble, and what stands after the place."""


def _safe_name(shard: Path, member: tarfile.TarInfo) -> PurePosixPath | None:
    """The member's name, None for a folder. Raises `DataError` for what must not be unpacked."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name or "\0" in member.name:
        raise DataError(
            f"{shard} {member.name!r}: a name that may lead out of the folder; pack the shard with plain names"
        )
    if member.isdir():
        return None
    if not member.isreg():
        what = "a link" if member.issym() or member.islnk() else "not a plain file"
        raise DataError(f"{shard} {member.name!r}: {what}; only plain files are unpacked: pack the files themselves")
    return name


def _add(
    sample: dict[str, Any], extension: str, name: PurePosixPath, file: IO[bytes], folder: Path, where: str
) -> None:
    """Put one member into its sample."""
    last = extension.rpartition(".")[2]
    if last in IMAGES:
        target = folder / name
        if target.exists():
            raise DataError(f"{where}: two files of this name in the shard; names may be used once")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(file, out)
        sample.setdefault("__images__", []).append(name.as_posix())
    elif last in TEXTS and not extension.startswith("__"):  # keys like `__key__` are not the shard's to give
        sample["caption" if extension in TEXTS else extension.rpartition(".")[0]] = _text(file)
    elif last == "cls":
        text = _text(file).strip()
        if not text.removeprefix("-").isdecimal():
            raise _BadMember("no whole number", f" holds {text[:40]!r}; a .cls holds one whole number")
        sample["cls"] = int(text)
    elif last == "json":
        try:
            value = json.loads(_text(file))
        except (json.JSONDecodeError, RecursionError) as error:
            raise _BadMember(NOT_JSON, f": {error}") from error
        if not isinstance(value, Mapping):
            raise _BadMember(NO_OBJECT, f" is {kind(value)}; the .json of a sample is an object")
        sample["__json__"] = {**sample.get("__json__", {}), **value}
    else:
        sample.setdefault("__skipped__", []).append(name.name)


def _text(file: IO[bytes]) -> str:
    data = file.read(LARGEST_TEXT + 1)
    if len(data) > LARGEST_TEXT:
        raise _BadMember("text too long", f" holds more than {LARGEST_TEXT >> 20} MiB; a text of a sample holds less")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BadMember(NOT_UTF8, f" at byte {error.start}: {of_bytes(error)}") from error


def _finished(sample: dict[str, Any]) -> dict[str, Any]:
    """What is written of a sample; the images stand apart, so that no key of a `.json` is taken for one."""
    if "__bad__" in sample:
        return {"bad": sample["__bad__"]}
    fields, images = sample.pop("__json__", {}), sample.pop("__images__", [])
    return {"images": images, "sample": {"__key__": sample["__key__"], **fields, **sample}}


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """Image-text shards."""
    return [
        DatasetSpec(
            name="webdataset",
            load=load_webdataset,
            files=webdataset_files,
            load_from=load_webdataset_from,
            summary="tar shards of images and texts, unpacked once into extract_to",
            suffixes=SUFFIXES,
        )
    ]

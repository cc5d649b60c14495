"""Files that are something else than their name says: each is refused with what it is and how to get the right one."""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmft.errors import DataError
from mmft.types import BadRecord
from mmft_plugins.sources import load_json, load_jsonl
from mmft_plugins.tables import load_csv, load_parquet
from mmft_plugins.text_files import load_text
from mmft_plugins.webdataset import load_webdataset

LOADS: dict[str, Callable[..., Iterator[Any]]] = {"json": load_json, "jsonl": load_jsonl, "csv": load_csv}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
NO_FILE = "not the file itself: a Git LFS pointer to it; fetch it with: git lfs pull"
CONTENT = b'[{"a": 1}]\n' * 20


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.json", CONTENT)
    return path.read_bytes()


PACKED: dict[str, Callable[[Path], bytes]] = {
    "gzip": lambda path: gzip.compress(CONTENT),
    "bzip2": lambda path: bz2.compress(CONTENT),
    "xz": lambda path: lzma.compress(CONTENT),
    "zip": zipped,
    "zstd": lambda path: b"\x28\xb5\x2f\xfd\x04\x58" + CONTENT,
}


@pytest.mark.parametrize("source", LOADS)
@pytest.mark.parametrize("packed", PACKED)
def test_a_compressed_file_is_to_be_unpacked_first(packed: str, source: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{source}"
    file.write_bytes(PACKED[packed](tmp_path / "packed"))
    with pytest.raises(DataError) as refused:
        list(LOADS[source](file))
    assert str(refused.value).startswith(f"{file}: compressed with {packed}; unpack it first, for example with ")


@pytest.mark.parametrize("source", LOADS)
def test_a_git_lfs_pointer_is_not_taken_for_the_file(source: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{source}"
    file.write_bytes(POINTER)
    with pytest.raises(DataError) as refused:
        list(LOADS[source](file))
    assert str(refused.value) == f"{file}: {NO_FILE}"


def test_a_pointer_is_no_parquet_file_and_no_shard(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for name, load in (("a.parquet", load_parquet), ("a.tar", load_webdataset)):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(DataError) as refused:
            list(load(tmp_path / name, extract_to=tmp_path / "images"))
        assert str(refused.value) == f"{tmp_path / name}: {NO_FILE}"


def test_a_pointer_among_texts_is_one_bad_record_and_not_trained(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(POINTER)
    (tmp_path / "b.txt").write_bytes(gzip.compress(CONTENT))
    (tmp_path / "c.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "d.txt").write_text("version https://git-lfs.github.com is where LFS lives")
    pointer, packed, latin, text = load_text(tmp_path)
    assert pointer == BadRecord(f"not text: {tmp_path / 'a.txt'}: {NO_FILE}")
    assert isinstance(packed, BadRecord) and packed.reason.startswith(f"not text: {tmp_path / 'b.txt'}: compressed ")
    assert isinstance(latin, BadRecord) and latin.reason.startswith(f"not UTF-8: {tmp_path / 'c.txt'} line 1 at byte 3")
    assert not isinstance(text, BadRecord)


@pytest.mark.parametrize("start", ["<!DOCTYPE html><html>404</html>", "a,b\n1,2\n", " \n  nothing"])
def test_of_a_file_that_does_not_begin_as_json_the_beginning_is_shown(start: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(start + "\n" * 40)
    with pytest.raises(DataError) as refused:
        list(load_json(file))
    shown = repr(start.strip()[:20])[1:-1]
    assert "Expecting value; the file begins with '" + shown in str(refused.value)
    assert "\n" not in str(refused.value) and str(refused.value).endswith("give the JSON file")


def test_of_an_object_with_thousands_of_keys_only_some_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("{" + ", ".join(f'"{n}": {{"text": "t"}}' for n in range(5000)) + "}")
    with pytest.raises(DataError) as refused:
        list(load_json(file))
    said = str(refused.value)
    assert "keys: '0', '1', '2', " in said and "'9' and 4,990 more)" in said and len(said) < 400

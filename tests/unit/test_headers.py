"""Many image files at once: each kind of bad file is found, counted by its reason, and stops nothing."""

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.data.headers import CHUNK, check_images, reason_kind


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def photo(path: Path, size: tuple[int, int] = (64, 48)) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def truncated(path: Path) -> None:
    photo(path)
    path.write_bytes(path.read_bytes()[:-800])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.png": (lambda path: None, "no such image file"),
    "folder.png": (lambda path: path.mkdir(), "is a folder, not an image"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "is empty (0 bytes), not an image"),
    "text.png": (lambda path: path.write_text("a cat"), "not an image"),
    "bomb.png": (bomb, "more than 89,478,485 pixels"),
    "float.tiff": (lambda path: Image.new("F", (4, 4)).save(path), "damaged or refused image"),
}


def test_each_kind_of_bad_file_is_found_by_its_header(tmp_path: Path) -> None:
    for name, (write, _) in BAD.items():
        write(tmp_path / name)
    photo(tmp_path / "good.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of a picture this large; it is counted instead
        report = check_images([str(tmp_path / name) for name in (*BAD, "good.jpg")])
    assert report.num_images == len(BAD) + 1
    assert {Path(path).name: reason_kind(reason) for path, reason in report.bad.items()} == {
        name: kind for name, (_, kind) in BAD.items()
    }
    assert report.reasons["is empty (0 bytes), not an image"] == 1


def test_only_decoding_finds_a_file_that_is_cut_off(tmp_path: Path) -> None:
    truncated(tmp_path / "cut.jpg")
    path = str(tmp_path / "cut.jpg")
    assert check_images([path]).bad == {}
    report = check_images([path], decode=True)
    assert "truncated" in report.bad[path] and report.decoded


@pytest.mark.parametrize("name", ["a\0b.png", "a\ud800.png", "x" * 5000 + ".png"])
def test_a_path_that_no_file_can_have_is_a_bad_image(name: str) -> None:
    assert list(check_images([name]).bad) == [name]


def test_a_file_is_read_once_however_often_it_is_named_and_progress_adds_up(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{k}.png") for k in range(3 * CHUNK + 5)]
    for k, name in enumerate(names):
        photo(Path(name), (k + 1, 2))
    steps: list[int] = []
    report = check_images([*names, *names[:50]], progress=steps.append)
    assert report.num_images == sum(steps) == len(names)
    assert (report.smallest, report.largest) == ((1, 2), (len(names), 2))


def test_the_order_of_bad_files_is_that_of_the_paths(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{k}.png") for k in range(2 * CHUNK)]
    assert list(check_images(names).bad) == names


def test_no_files_is_an_empty_report() -> None:
    report = check_images([])
    assert (report.num_images, report.bad, report.smallest) == (0, {}, None)

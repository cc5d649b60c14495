"""Pictures that cannot be read, and unusual ones: what `mmft data check FILE` and a batch make of each."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_bench import GOOD, PATCHES, Bench, told
from PIL import Image as Pillow

from mmft.data.collate import BAD_SAMPLES
from mmft.data.image_paths import ImageFinder, is_mended
from mmft.errors import DataError
from mmft.plugins import Plugins


@pytest.fixture
def bench(tmp_path: Path, plugins: Plugins, tiny_llm_path: Path) -> Bench:
    """An empty folder of pictures but for `dot.png`, and a model that takes four tokens an image."""
    return Bench(tmp_path, plugins, tiny_llm_path)


def png_header(width: int, height: int) -> bytes:
    """A PNG of 60 bytes that claims to hold width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise(width: int = 64, height: int = 48) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def truncated_jpeg(path: Path) -> None:
    noise().save(path)
    path.write_bytes(path.read_bytes()[:-800])


# How to write it, the reason, and whether the header alone tells.
BAD_PICTURES: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "empty.jpg": (
        lambda path: path.write_bytes(b""),
        "is empty (0 bytes), not an image; copy or download it again",
        True,
    ),
    "truncated.jpg": (truncated_jpeg, "damaged or refused image: OSError: ", False),
    "bomb.png": (
        lambda path: path.write_bytes(png_header(30_000, 30_000)),
        "more than 178,956,970 pixels; at most 89,478,485 are allowed: make it smaller",
        True,
    ),
    "text.png": (lambda path: path.write_text("<html>404</html>"), "not an image; allowed are PNG, JPEG, WEBP, ", True),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_picture_that_cannot_be_read_is_told_with_its_record_before_and_while_training(
    name: str, bench: Bench
) -> None:
    write, reason, by_header = BAD_PICTURES[name]
    path = bench.images / name
    write(path)
    file = bench.write([GOOD[0], told("<image>?", "A dot.", image=name), GOOD[1]])

    assert bench.check(file, decode=True).images.bad.keys() == {str(path)}
    quick = bench.check(file)
    assert (str(path) in quick.images.bad) is by_header
    found = bench.check(file, decode=True)
    assert found.images.bad[str(path)].startswith(reason) and "\n" not in found.images.bad[str(path)]
    assert "1 images cannot be read" in found.problems[-1]

    store = bench.prepare(file)
    batch = bench.batch(store)
    (drop,) = batch[BAD_SAMPLES]
    assert (drop.source, drop.record) == (str(file), 2)
    assert drop.reason.startswith(f"image cannot be read: {path}: {reason}")
    labels = batch["labels"][0].tolist()
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert set(labels[starts[1] : starts[2]]) == {-100}  # its record alone teaches nothing
    assert any(label >= 0 for label in labels[: starts[1]]) and any(label >= 0 for label in labels[starts[2] :])
    with pytest.raises(DataError, match=f"data.json record 2: image cannot be read: .*{name}: "):
        bench.batch(store, "error")


def cmyk(path: Path) -> None:
    Pillow.new("RGB", (8, 8), (200, 40, 20)).convert("CMYK").save(path, quality=100)


def grey_16_bit(path: Path) -> None:
    Pillow.fromarray(np.full((8, 8), 200 * 256 + 7, np.uint16)).save(path)


def palette_with_alpha(path: Path) -> None:
    picture = Pillow.new("P", (8, 8), 0)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.paste(1, (4, 0, 8, 8))
    picture.save(path, transparency=0)  # the left half cannot be seen


def animation(path: Path) -> None:
    frames = [Pillow.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def lying(path: Path) -> None:
    """Red above green, stored on its side with the EXIF note that says so."""
    upright = Pillow.new("RGB", (8, 8), (0, 255, 0))
    upright.paste((255, 0, 0), (0, 0, 8, 4))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to see it
    upright.transpose(Pillow.Transpose.ROTATE_90).save(path, exif=exif)


WHITE, RED, GREEN = (255, 255, 255), (255, 0, 0), (0, 255, 0)
# How to write it, and what is trained on: the colours of its top left, top right, bottom left and bottom right.
STRANGE_PICTURES: dict[str, tuple[Callable[[Path], object], tuple[tuple[int, int, int], ...]]] = {
    "cmyk.jpg": (cmyk, ((200, 40, 20),) * 4),
    "grey16.png": (grey_16_bit, ((200, 200, 200),) * 4),  # the high byte
    "palette.png": (palette_with_alpha, (WHITE, (10, 200, 30)) * 2),  # what cannot be seen is white
    "animated.gif": (animation, (RED,) * 4),  # the first frame
    "exif.png": (lying, (RED, RED, GREEN, GREEN)),  # upright
    "pixel.png": (lambda path: Pillow.new("RGB", (1, 1), "red").save(path), (RED,) * 4),  # blown up
}


@pytest.mark.parametrize("name", STRANGE_PICTURES)
def test_an_unusual_picture_is_trained_on_upright_and_in_its_colours(name: str, bench: Bench) -> None:
    write, corners = STRANGE_PICTURES[name]
    write(bench.images / name)
    file = bench.write([told("<image>?", "A dot.", image=name)])
    report = bench.check(file, decode=True)
    assert not report.problems and not report.images.bad and report.images.num_images == 1
    store = bench.prepare(file)
    batch = bench.batch(store)
    assert BAD_SAMPLES not in batch and not len(store.drops)
    assert store[0].input_ids.tolist().count(bench.tokenizer.image_id) == PATCHES
    pixels = (batch["pixel_values"][0] * 255).round().int()
    assert pixels.shape == (3, 8, 8)
    seen = [pixels[:, y, x].tolist() for y in (1, 6) for x in (1, 6)]
    assert np.abs(np.array(seen) - np.array(corners)).max() <= 2  # JPEG rounds


def test_a_picture_told_to_be_spelled_as_on_windows_is_looked_for_again(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its path is in Windows' form: .*write / for \\: sub/0.png") as refused:
        ImageFinder(tmp_path).find(r"sub\0.png")
    assert not is_mended(str(refused.value))
    (tmp_path / r"sub\0.png").write_bytes(b"x")  # a file may really be called so
    assert is_mended(str(refused.value)) and ImageFinder(tmp_path).find(r"sub\0.png") == str(tmp_path / r"sub\0.png")

"""mmft.images: files that are not pictures, pictures that are unusual, and the numbers of the transform."""

import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmft.errors import DataError
from mmft.images import MAX_PIXELS, ImageTransform, image_size, open_image, pad_to_square

HALF = (0.5, 0.5, 0.5)


def png_header(width: int, height: int) -> bytes:
    """A PNG of 60 bytes that claims to hold width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def photo(width: int = 64, height: int = 48) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pixels_of(path: Path) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(open_image(path)).reshape(-1, 3).tolist()]


def write_corrupt_png(path: Path) -> None:
    photo().save(path)
    data = bytearray(path.read_bytes())
    data[60:120] = b"\x00" * 60
    path.write_bytes(data)


def write_truncated_jpeg(path: Path) -> None:
    photo().save(path)
    path.write_bytes(path.read_bytes()[:-800])


def write_float_tiff(path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(path)


def write_postscript(path: Path) -> None:
    photo().save(path, format="EPS")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.png": (lambda path: None, "no such image file"),
    "folder.png": (lambda path: path.mkdir(), "is a folder"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "0 bytes"),
    "text.png": (lambda path: path.write_text("a cat"), "not an image; allowed are PNG, JPEG"),
    "corrupt.png": (write_corrupt_png, "damaged"),
    "truncated.jpg": (write_truncated_jpeg, "truncated"),
    "float.tiff": (write_float_tiff, "8 bits a channel"),
    "program.png": (write_postscript, "not an image"),  # Pillow would hand it to Ghostscript
    "bomb.png": (lambda path: path.write_bytes(png_header(50_000, 50_000)), "pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_whole_picture_is_refused_with_its_path_and_the_reason(tmp_path: Path, name: str) -> None:
    write, reason = BAD[name]
    write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert reason in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_size_is_checked_before_pixels_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    path.write_bytes(png_header(9_000, 9_000))  # below Pillow's limit; its pixels are not there, so decoding would fail
    with pytest.raises(DataError, match=r"9000 x 9000 = 81,000,000 pixels; at most 1,000,000 are allowed"):
        open_image(path, max_pixels=1_000_000)


def test_a_picture_of_exactly_the_allowed_size_is_read(tmp_path: Path) -> None:
    photo(10, 10).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", max_pixels=100).size == (10, 10)
    with pytest.raises(DataError):
        open_image(tmp_path / "a.png", max_pixels=99)


def test_an_rgb_picture_is_read_unchanged_from_str_and_path(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        image = open_image(source)
        assert image.mode == "RGB"
        assert image.tobytes() == photo().tobytes()


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (40, 20), "red")
    sideways.paste("blue", (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after turning it 90 degrees clockwise: left becomes top
    sideways.save(tmp_path / "a.png", exif=exif)
    image = open_image(tmp_path / "a.png")
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == (0, 0, 255)
    assert image.getpixel((10, 35)) == (255, 0, 0)


def test_cmyk_is_converted_to_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    assert open_image(tmp_path / "a.tiff").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    pixels = np.asarray(open_image(tmp_path / f"a.{suffix}"))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 0x80, 0xFF]
    assert (pixels == pixels[..., :1]).all()


def test_32_bit_grey_beyond_16_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="beyond 16 bits"):
        open_image(tmp_path / "a.tiff")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.save(tmp_path / "a.png")
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "b.png", transparency=1)
    grey = Image.new("LA", (2, 1), (7, 255))
    grey.putpixel((1, 0), (7, 0))
    grey.save(tmp_path / "c.png")
    assert pixels_of(tmp_path / "a.png") == [(255, 0, 0), (255, 255, 255)]
    assert pixels_of(tmp_path / "b.png") == [(255, 0, 0), (255, 255, 255)]
    assert pixels_of(tmp_path / "c.png") == [(7, 7, 7), (255, 255, 255)]


def test_black_and_white_and_palette_pictures_become_rgb(tmp_path: Path) -> None:
    Image.new("1", (3, 3), 1).save(tmp_path / "a.png")
    photo().convert("P").save(tmp_path / "b.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "b.png").tobytes() == photo().convert("P").convert("RGB").tobytes()


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png"):
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / f"a.{suffix}").getpixel((4, 4)) == (255, 0, 0), suffix


def test_of_the_two_pictures_of_a_phones_mpo_file_the_first_is_taken(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    red, _, blue = pixels_of(tmp_path / "a.jpg")[0]
    assert red > 200 > 50 > blue


def test_the_file_is_closed_whatever_it_holds(tmp_path: Path) -> None:
    write_truncated_jpeg(tmp_path / "a.jpg")
    photo().save(tmp_path / "b.jpg")
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("needs /proc")
    before = len(list(handles.iterdir()))
    for _ in range(5):
        open_image(tmp_path / "b.jpg")
        with pytest.raises(DataError):
            open_image(tmp_path / "a.jpg")
    assert len(list(handles.iterdir())) == before


def test_padding_centres_the_picture_on_its_colour() -> None:
    wide = pad_to_square(photo(5, 2), (1, 2, 3))
    assert wide.size == (5, 5)
    assert wide.crop((0, 1, 5, 3)).tobytes() == photo(5, 2).tobytes()  # (5 - 2) // 2 = 1 row above, 2 below
    assert {wide.getpixel((x, y)) for x in range(5) for y in (0, 3, 4)} == {(1, 2, 3)}
    tall = pad_to_square(photo(2, 5), (1, 2, 3))
    assert tall.crop((1, 0, 3, 5)).tobytes() == photo(2, 5).tobytes()
    square = photo(4, 4)
    assert pad_to_square(square, (1, 2, 3)) is square


def test_a_transform_gives_contiguous_float32_and_does_not_change_the_image() -> None:
    transform = ImageTransform(resize=(6, 10), mean=HALF, std=HALF)
    image = photo()
    pixels = transform(image)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 6, 10)
    assert pixels.is_contiguous()
    assert image.tobytes() == photo().tobytes()


def test_a_transform_pickles_and_compares() -> None:
    transform = ImageTransform(resize=8, crop=(8, 8), mean=HALF, std=HALF, pad_to_square=True)
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform
    assert torch.equal(again(photo()), transform(photo()))


def test_the_output_size_is_known_without_a_picture_where_it_is_fixed() -> None:
    assert ImageTransform(resize=9, crop=(8, 7), mean=HALF, std=HALF).output_size == (8, 7)
    assert ImageTransform(resize=(5, 6), mean=HALF, std=HALF).output_size == (5, 6)
    assert ImageTransform(resize=9, mean=HALF, std=HALF).output_size is None
    assert ImageTransform(resize=9, mean=HALF, std=HALF, pad_to_square=True).output_size == (9, 9)


def test_padding_to_a_square_keeps_the_whole_picture_in_view() -> None:
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (0, 0, 30, 30))  # only at the left edge, which a centre crop to a square cuts away
    cropping = ImageTransform(resize=30, crop=(30, 30), mean=HALF, std=HALF)
    assert cropping(image).max() == -1
    assert replace(cropping, pad_to_square=True)(image).max() > 0.9


def test_a_very_narrow_picture_is_refused_and_not_blown_up() -> None:
    sliver = Image.new("RGB", (1, 60_000))
    transform = ImageTransform(resize=224, crop=(224, 224), mean=HALF, std=HALF)
    with pytest.raises(DataError, match=rf"1 x 60000 pixels.*{MAX_PIXELS:,} pixels.*pad_to_square"):
        transform(sliver)


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("corrupt.png", "truncated.jpg")])
def test_a_header_is_refused_for_the_reason_the_picture_would_be(tmp_path: Path, name: str) -> None:
    BAD[name][0](tmp_path / name)
    with pytest.raises(DataError) as whole:
        open_image(tmp_path / name)
    with pytest.raises(DataError) as header:
        image_size(tmp_path / name)
    assert str(header.value) == str(whole.value)


def test_the_size_comes_from_the_header_alone(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(png_header(300, 200))  # it has no pixels
    write_truncated_jpeg(tmp_path / "cut.jpg")
    assert image_size(tmp_path / "wide.png") == (300, 200)
    assert image_size(tmp_path / "cut.jpg") == photo().size
    with pytest.raises(DataError, match=r"300 x 200 = 60,000 pixels; at most 59,999 are allowed"):
        image_size(tmp_path / "wide.png", max_pixels=59_999)

"""Pictures: open a file safely or read its header, pad it to a square, make the tensor an encoder was trained on.

Public, for the plugins that offer vision encoders. Pillow does the work; numpy and torch are imported when called.
`ImageTransform` repeats transformers' PIL image processors bit for bit (tests/oracle/test_image_preprocessing.py),
but is a few numbers, so it pickles, compares and prints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING

from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from mmft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 89_478_485  # as Pillow's MAX_IMAGE_PIXELS: 256 MiB of RGB. Pillow itself refuses twice as many.
# What cameras and data sets hold. Not everything Pillow knows: opening an EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_FLOAT = "float pixels have no defined range; save the image with 8 bits a channel"


def open_image(source: str | Path, *, max_pixels: int = MAX_PIXELS) -> PILImage.Image:
    """Read a picture as 8-bit RGB, upright.

    The EXIF rotation is applied; of an animation the first frame is taken; transparency is laid on white, as
    transformers does since 5.23 (LLaVA's `.convert("RGB")` shows whatever colour hides below); of 16-bit grey the high
    byte is kept, as Pillow does with 16-bit RGB. The size is read and checked before a pixel is decoded.

    Raises DataError, with the path and the reason, for anything that is not a whole, readable picture.
    """
    with _opened(source, max_pixels) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def image_size(source: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as the file's header states them; no pixel is decoded and no EXIF rotation applied.

    Everything `open_image` can refuse without the pixels is refused here for the same reason. A file whose pixels are
    cut off or damaged passes: only decoding can see that.

    Raises DataError, with the path and the reason.
    """
    with _opened(source, max_pixels) as image:
        if image.mode == "F":
            raise ValueError(_FLOAT)
        return image.size


@contextmanager
def _opened(source: str | Path, max_pixels: int) -> Iterator[PILImage.Image]:
    """The picture with its header read and its size checked; whatever goes wrong with it inside is a DataError."""
    path = Path(source)
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        status = None
    if status is None or not S_ISREG(status.st_mode):
        folder = status is not None and S_ISDIR(status.st_mode)
        raise DataError(f"{path}: " + ("is a folder, not an image" if folder else "no such image file"))
    if status.st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes), not an image; copy or download it again")
    PILImage.init()  # once a process: registers the formats; AVIF is not in every build of Pillow
    try:
        with PILImage.open(path, formats=[name for name in FORMATS if name in PILImage.OPEN]) as image:
            width, height = image.size
            if width * height > max_pixels:
                counted = f"{width} x {height} = {width * height:,}"
                raise DataError(f"{path}: {counted} pixels; at most {max_pixels:,} are allowed: make it smaller")
            yield image
    except DataError:
        raise
    except PILImage.DecompressionBombError as error:  # Pillow's own limit, twice ours, met before ours can be
        large = f"more than {2 * MAX_PIXELS:,} pixels; at most {max_pixels:,} are allowed: make it smaller"
        raise DataError(f"{path}: {large}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image; allowed are {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        remedy = "" if isinstance(error, ValueError) else "; copy or download it again"
        raise DataError(f"{path}: damaged or refused image: {type(error).__name__}: {error}{remedy}") from error


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "F":
        raise ValueError(_FLOAT)
    if image.mode.startswith("I"):
        import numpy as np

        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("grey values beyond 16 bits; save the image with 8 bits a channel")
        image = PILImage.fromarray((pixels >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = PILImage.alpha_composite(white, rgba)
    return image.convert("RGB")


def pad_to_square(image: PILImage.Image, color: tuple[int, int, int]) -> PILImage.Image:
    """Centre the picture on a square of `color` as wide as its longer side; a square picture is returned as it is.

    LLaVA's `expand2square` (https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/mm_utils.py), bit for bit.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PILImage.new(image.mode, (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTransform:
    """RGB image -> float32[3, H, W]: pad, resize, crop the centre, scale, normalise.

    `resize` is the length of the short edge, or (height, width); `crop` is (height, width), and a picture smaller than
    it is surrounded with black. `pad_to_square` pads with the mean colour first, as LLaVA-1.5 does, so that nothing
    of the picture is cut away. `resample` is a Pillow filter number (2 bilinear, 3 bicubic).

    Example:
        >>> transform = ImageTransform(resize=28, crop=(28, 28), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> transform(PILImage.new("RGB", (40, 30))).shape
        torch.Size([3, 28, 28])
    """

    resize: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: tuple[int, int] | None = None
    resample: int = 3
    scale: float = 1 / 255
    pad_to_square: bool = False

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of every result, or None where they follow the picture."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.resize, tuple):
            return self.resize
        return (self.resize, self.resize) if self.pad_to_square else None

    def __call__(self, image: PILImage.Image) -> "Tensor":
        """The tensor of one RGB image.

        Raises DataError where resizing the short edge of a very long picture would make more than MAX_PIXELS.
        """
        import numpy as np
        import torch

        if self.pad_to_square:
            red, green, blue = (int(255 * value) for value in self.mean)
            image = pad_to_square(image, (red, green, blue))
        height, width = self._resized(image.size)
        image = image.resize((width, height), resample=PILImage.Resampling(self.resample))
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        # A byte has 256 values, so the arithmetic is done on those and looked up. Scaled in float64, normalised in
        # float32: the order and types of transformers' rescale() and normalize(), so results are equal to the bit.
        values = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        pixels = np.asarray(image)
        result = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            np.take((values - np.float32(mean)) / np.float32(std), pixels[..., channel], out=result[channel])
        return torch.from_numpy(result)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after resizing a picture of (width, height)."""
        if isinstance(self.resize, tuple):
            return self.resize
        width, height = size
        length = int(self.resize * max(size) / min(size))
        if self.resize * length > MAX_PIXELS:
            raise DataError(
                f"image of {width} x {height} pixels: with its short edge at {self.resize} it is {length:,} long, too "
                f"narrow (at most {MAX_PIXELS:,} pixels); pad_to_square=True would take it"
            )
        return (length, self.resize) if width <= height else (self.resize, length)

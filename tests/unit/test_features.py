"""The feature cache: each picture is encoded once, and one that cannot be read has a reason and no features."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image as Pillow

from mmft.config import Use
from mmft.errors import DataError
from mmft.modeling.features import FeatureStore, encoder_digest
from mmft.specs import VisionInfo
from mmft.types import Image


def pixels(picture: Pillow.Image) -> torch.Tensor:
    return torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32)[:, None, None].expand(3, 2, 2)


class Counting:
    """An encoder whose features are the colour of the picture."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += len(images)
        return images[:, :, 0, 0][:, None]

    autocast = staticmethod(nullcontext)


@pytest.fixture
def pictures(tmp_path: Path) -> SimpleNamespace:
    """Two good ones, a copy of the first, one that is cut off and one that is not there."""
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        Pillow.new("RGB", (9, 9), colour).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "copy.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return SimpleNamespace(**{name: str(tmp_path / f"{name}.png") for name in ("red", "blue", "copy", "cut", "gone")})


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    info = VisionInfo(hidden_size=3, num_patches=1, transform=pixels)
    return lambda: FeatureStore(tmp_path / "features", info, torch.float32)


def read(store: FeatureStore, *sources: str) -> list[list[float]]:
    return store.read([Image(source) for source in sources])[:, 0].tolist()


def test_each_picture_is_encoded_once_whatever_it_is_called(pictures: Any, opened: Any) -> None:
    encoder = Counting()
    assert opened().fill([pictures.red, pictures.copy, pictures.blue], encoder, pixels) == encoder.encoded == 2
    again = opened()
    assert again.fill([pictures.blue, pictures.red], encoder, pixels) == 0 and encoder.encoded == 2
    assert read(again, pictures.copy, pictures.blue) == [[255, 0, 0], [0, 0, 255]]


def test_what_cannot_be_read_has_a_reason_and_reads_as_zeros(pictures: Any, opened: Any) -> None:
    store, encoder = opened(), Counting()
    sources = [pictures.cut, pictures.red, pictures.gone, pictures.blue]
    assert store.fill(sources, encoder, pixels, refuse=False) == encoder.encoded == 2
    assert read(store, *sources) == [[0, 0, 0], [255, 0, 0], [0, 0, 0], [0, 0, 255]]
    store.check([Image(pictures.red), Image(pictures.blue)])
    for name in ("cut", "gone"):
        with pytest.raises(DataError, match=rf"{name}\.png"):
            store.check([Image(pictures.red), Image(getattr(pictures, name))])


def test_a_picture_that_cannot_be_read_is_an_error_where_it_is_to_be_one(pictures: Any, opened: Any) -> None:
    store, encoder = opened(), Counting()
    with pytest.raises(DataError, match=r"cut\.png.*\(data\.on_bad_sample is 'error'\)"):
        store.fill([pictures.red, pictures.cut], encoder, pixels)
    assert opened().fill([pictures.red], encoder, pixels) == 0  # what was encoded before is kept


def test_a_picture_that_was_mended_is_encoded(pictures: Any, opened: Any) -> None:
    encoder = Counting()
    opened().fill([pictures.cut], encoder, pixels, refuse=False)
    Path(pictures.cut).write_bytes(Path(pictures.blue).read_bytes())
    store = opened()
    assert store.fill([pictures.cut], encoder, pixels, refuse=False) == 1
    assert read(store, pictures.cut) == [[0, 0, 255]]


def test_a_store_of_nothing_but_broken_pictures_still_reads(pictures: Any, opened: Any) -> None:
    store = opened()
    assert store.fill([pictures.cut], Counting(), pixels, refuse=False) == 0
    assert read(store, pictures.cut) == [[0, 0, 0]]


@pytest.mark.parametrize("option", ["path", "weights"])
@pytest.mark.parametrize("inside", ["", "model.safetensors"])
def test_other_weights_in_a_file_or_folder_of_any_option_are_another_encoder(tmp_path, option, inside):
    place = tmp_path / "encoder"
    file = place / inside if inside else place
    file.parent.mkdir(exist_ok=True)
    encoder = Use(name="acme_vit", options={option: str(place), "width": 8})
    info = VisionInfo(num_patches=4, hidden_size=8, transform=pixels)
    digests = set()
    for content in (b"one", b"two"):
        file.write_bytes(content)
        digests.add(encoder_digest(encoder, info, torch.float32))
    assert len(digests) == 2

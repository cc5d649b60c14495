"""Conversations to take along from the page, on the disk of the server."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from mmft.chat.tools import Toolbox
from mmft.chat.web.files import Downloads
from mmft.chat.web.turns import Answer, Turn
from mmft.chat.web.uploads import stored

SEATS: Any = [SimpleNamespace(tools=Toolbox())]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page"))
    (tmp_path / "page").mkdir()
    return tmp_path / "page"


def said(text: str, *images: Path) -> list[Turn]:
    return [Turn("Hi", tuple(map(str, images)), (Answer((text,)),))]


def files(folder: Path) -> list[str]:
    return sorted(path.read_text("utf-8") for path in folder.rglob("*") if path.is_file())


def test_of_a_visitor_only_the_last_download_is_kept_and_none_once_he_left(folder: Path) -> None:
    downloads = Downloads()
    for text in ("one", "two", "three"):
        path = downloads.write("ann", said(text), SEATS, None)
    downloads.write("bob", said("four"), SEATS, None)
    assert path is not None and "three" in path.read_text("utf-8")
    assert [("three" in text, "four" in text) for text in files(folder)] in (
        [(True, False), (False, True)],
        [(False, True), (True, False)],
    )
    for visitor in ("ann", "bob", "nobody"):
        downloads.remove(visitor)
    assert list(folder.rglob("*/*")) == []


def test_of_all_visitors_only_the_newest_downloads_are_kept(folder: Path) -> None:
    downloads = Downloads(most=3)
    paths = [downloads.write(f"visitor {number}", said("yes"), SEATS, None) for number in range(5)]
    assert [path is not None and path.exists() for path in paths] == [False, False, True, True, True]


def test_downloads_together_have_a_size_but_the_newest_is_kept_whatever_its_own(folder: Path) -> None:
    downloads = Downloads(room=50_000)
    paths = [
        downloads.write(f"visitor {n}", said("x" * size), SEATS, None)
        for n, size in enumerate((20_000, 20_000, 20_000, 100_000))
    ]
    assert [path is not None and path.exists() for path in paths] == [False, False, False, True]
    paths = [downloads.write(f"visitor {n}", said("x" * 20_000), SEATS, None) for n in range(3)]
    assert [path is not None and path.exists() for path in paths] == [False, True, True]


def test_beside_an_archive_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    path = Downloads().write("ann", said("yes", tmp_path / "a.png"), SEATS, "You see.")
    assert path is not None and [found.name for found in folder.rglob("*.*")] == [path.name]
    with ZipFile(path) as archive:
        assert archive.namelist() == ["conversation.json", "pictures/1-a.png"]
        assert json.loads(archive.read("conversation.json"))["messages"][0]["content"] == "You see."


def test_a_download_that_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Downloads().write("ann", said("yes", tmp_path / "gone.png"), SEATS, None)
    assert list(folder.rglob("*.*")) == []


def test_where_nothing_was_said_nothing_is_written(folder: Path) -> None:
    assert Downloads().write("ann", [Turn("Hi")], SEATS, None) is None
    assert list(folder.rglob("*.*")) == []


def test_downloads_take_no_room_of_the_uploads(folder: Path) -> None:
    (folder / "a.png").write_bytes(bytes(5000))
    Downloads().write("ann", said("x" * 50_000), SEATS, None)
    assert stored(folder) == 5000

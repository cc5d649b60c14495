"""The `text` source."""

import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft.types import BadRecord
from mmft_plugins.pretrain import mmft_data_maps
from mmft_plugins.text_files import _pieces, load_text, load_text_from


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_bytes("\ufeff# Titel\r\n\r\nä\r\rx\r\n".encode())
    (tmp_path / "sub" / "c.txt").write_text("one\n\n\n\ntwo\n  \n\nthree")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_a_folder_gives_one_record_for_each_text_file(folder: Path) -> None:
    assert list(load_text(folder)) == [
        {"text": "", "path": str(folder / "a.txt")},
        {"text": "# Titel\n\nä\n\nx\n", "path": str(folder / "b.md")},
        {"text": "one\n\n\n\ntwo\n  \n\nthree", "path": str(folder / "sub" / "c.txt")},
    ]


def test_split_gives_the_pieces_that_are_not_blank(folder: Path) -> None:
    assert [record["text"] for record in load_text(folder, split="\n\n")] == [
        "# Titel",
        "ä",
        "x\n",
        "one",
        "two\n  ",
        "three",
    ]
    assert [record["text"] for record in load_text(folder / "sub", split="\n")] == ["one", "two", "three"]


@given(st.text(alphabet="a-\n"), st.integers(1, 4), st.sampled_from(["\n", "\n\n", "--", "a-a"]))
def test_pieces_do_not_depend_on_the_blocks(text: str, size: int, split: str) -> None:
    blocks = (text[i : i + size] for i in range(0, len(text), size))
    assert list(_pieces(blocks, split)) == [piece for piece in text.split(split) if piece.strip()]


def test_other_suffixes_can_be_named(folder: Path) -> None:
    assert [record["path"] for record in load_text(folder, suffixes=[".md"])] == [str(folder / "b.md")]


@pytest.mark.parametrize("split", [None, "\n\n"])
def test_random_access_gives_what_reading_on_gives(split: str | None, folder: Path) -> None:
    for start in range(8):
        assert list(load_text_from(start, folder, split)) == list(islice(load_text(folder, split), start, None))


def test_the_pretrain_map_reads_what_the_source_gives(folder: Path) -> None:
    record = next(iter(load_text(folder / "b.md")))
    read = [data_map.name for data_map in mmft_data_maps() if data_map.name == "pretrain" and data_map.fn(record)]
    assert read == ["pretrain"]


def test_a_file_that_is_not_utf8_is_a_bad_record_and_the_other_files_are_read(folder: Path) -> None:
    latin = folder / "bad.txt"
    latin.write_bytes(b"a\ncaf\xe9 x")
    first, _, bad, last = load_text(folder)
    assert isinstance(bad, BadRecord) and not isinstance(first, BadRecord) and not isinstance(last, BadRecord)
    assert bad.reason.startswith(
        f"not UTF-8: {latin} line 2 at byte 5: invalid continuation byte (found 0xe9); save the"
    )
    assert list(load_text_from(2, folder)) == [bad, last]


def test_a_file_in_pieces_that_is_not_utf8_and_an_empty_split_are_refused(folder: Path) -> None:
    (folder / "latin.txt").write_bytes(b"a\ncaf\xe9 x")
    with pytest.raises(DataError, match=r"latin.txt line 2: not UTF-8 at byte 5: .*found 0xe9.*iconv"):
        list(load_text(folder / "latin.txt", split="\n"))
    with pytest.raises(DataError, match="split: an empty string"):
        list(load_text(folder, split=""))


def test_memory_does_not_grow_with_a_file_that_is_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(("word " * 200 + "\n") * 30_000)
    tracemalloc.start()
    count = sum(1 for _ in load_text(path, split="\n"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000 and peak < 10e6


def test_the_source_is_offered() -> None:
    assert load_plugins().datasets.get("text").load is load_text

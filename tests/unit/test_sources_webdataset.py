"""The `webdataset` source."""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft.types import BadRecord
from mmft_plugins.webdataset import load_webdataset, load_webdataset_from, unpacked, webdataset_files

Member = tuple[str, bytes | str]
Pack = Callable[..., Path]


def picture(red: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    def pack(name: str, members: Sequence[Member], **changes: Any) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                data = content.encode() if isinstance(content, str) else content
                info.size = 0 if changes else len(data)
                for key, value in changes.items():
                    setattr(info, key, value)
                tar.addfile(info, None if changes else io.BytesIO(data))
        return path

    return pack


def load(path: Any, tmp_path: Path) -> list[Any]:
    return list(load_webdataset(path, extract_to=tmp_path / "out"))


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_files_of_one_name_are_one_sample(name: str, pack: Pack, tmp_path: Path) -> None:
    fields = json.dumps({"caption": "from json", "width": 2, "__key__": "no", "odd": "\ud800"})
    path = pack(
        name, [("a/1.JPG", b"x"), ("a/1.json", fields), ("a/1.txt", "ä cat"), ("a/2.cls", " 7\n"), ("a/2.npy", "")]
    )
    first, second = load(path, tmp_path)
    image = Path(first.pop("image"))
    assert image.is_absolute() and image.read_bytes() == b"x" and image.is_relative_to(tmp_path / "out")
    assert first == {"__key__": "a/1", "caption": "ä cat", "width": 2, "odd": "\ud800"}
    assert second == {"__key__": "a/2", "cls": 7, "__skipped__": ["2.npy"]}


def test_several_images_of_a_sample_are_a_list_in_order(pack: Pack, tmp_path: Path) -> None:
    path = pack("s.tar", [("1.right.png", b"r"), ("1.left.png", b"l"), ("1.question.txt", "?")])
    (record,) = load(path, tmp_path)
    assert [Path(image).read_bytes() for image in record["image"]] == [b"r", b"l"]
    assert record["question"] == "?"


def test_the_caption_map_reads_a_sample_and_its_image_opens(pack: Pack, tmp_path: Path) -> None:
    record = load(pack("s.tar", [("1.png", picture(200)), ("1.txt", "a cat")]), tmp_path)[0]
    sample = load_plugins().data_maps.get("caption").fn(record)
    assert sample is not None and not hasattr(sample, "text")
    (image,) = sample.images  # type: ignore[union-attr]
    with Image.open(image.source) as opened:
        assert opened.getpixel((0, 0)) == (200, 0, 0)


def test_a_shard_is_unpacked_once_and_again_when_it_changes(pack: Pack, tmp_path: Path) -> None:
    path = pack("s.tar", [("1.png", b"old"), ("1.txt", "x")])
    image = Path(load(path, tmp_path)[0]["image"])
    image.write_bytes(b"marked")
    assert Path(load(path, tmp_path)[0]["image"]).read_bytes() == b"marked"
    pack("s.tar", [("1.png", b"new!"), ("1.txt", "x")])
    os.utime(path, (1, 1))
    assert Path(load(path, tmp_path)[0]["image"]).read_bytes() == b"new!"


def test_shards_are_read_in_the_order_of_their_numbers(pack: Pack, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        pack(f"s-0{number}.tar", [(f"{number}{i}.txt", f"{number}{i}") for i in range(3)])
    names = [file.name for file in webdataset_files(str(tmp_path / "s-{00..02}.tar"), tmp_path)]
    assert names == ["s-00.tar", "s-01.tar", "s-02.tar"]
    whole = [record["caption"] for record in load(tmp_path, tmp_path)]
    assert whole == ["00", "01", "02", "10", "11", "12", "20", "21", "22"]
    for start in range(11):
        found = load_webdataset_from(start, tmp_path, extract_to=tmp_path / "out")
        assert list(found) == list(islice(load(tmp_path, tmp_path), start, None))


def test_two_shards_with_the_same_names_do_not_meet(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [pack(name, [("1.png", name), ("1.txt", "x")]) for name in ("s.tar", "b/s.tar")]
    assert [Path(record["image"]).read_text() for record in load(paths, tmp_path)] == ["s.tar", "b/s.tar"]


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "a\\..\\evil.png", "c:evil.png"])
def test_a_name_that_leads_out_is_refused_and_nothing_is_written(name: str, pack: Pack, tmp_path: Path) -> None:
    path = pack("s.tar", [("1.png", b"fine"), (name, b"evil")])
    before = set(tmp_path.parent.rglob("*"))
    with pytest.raises(DataError, match=r"s.tar '.*evil.png': a name that may lead out of the folder"):
        load(path, tmp_path)
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "out"}


@pytest.mark.parametrize(
    ("kind", "what"), [(tarfile.SYMTYPE, "a link"), (tarfile.LNKTYPE, "a link"), (tarfile.FIFOTYPE, "not a plain file")]
)
def test_links_and_devices_are_refused(kind: bytes, what: str, pack: Pack, tmp_path: Path) -> None:
    path = pack("s.tar", [("1.png", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match=rf"s.tar '1.png': {what}; only plain files are unpacked"):
        load(path, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_json_cannot_name_images_of_its_own(pack: Pack, tmp_path: Path) -> None:
    path = pack("s.tar", [("1.json", '{"__images__": ["../../x"], "images": ["y"], "sample": 1}')])
    assert load(path, tmp_path) == [{"__key__": "1", "__images__": ["../../x"], "images": ["y"], "sample": 1}]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("1.png", b"a"), ("1.png", b"b")], "1.png: two files of this name"),
        (
            [("1.png", b"a"), ("2.png", b"b"), ("1.txt", b"c")],
            "1.txt: the files of sample '1' do not follow one another",
        ),
    ],
)
def test_a_shard_in_disorder_is_refused_by_shard_and_member(
    members: list[Member], problem: str, pack: Pack, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"s.tar {problem}"):
        load(pack("s.tar", members), tmp_path)


@pytest.mark.parametrize(
    ("member", "content", "problem"),
    [
        ("2.json", b'{"a": ', "not JSON: s.tar 2.json: Expecting value"),
        ("2.json", b"[1]", "not an object: s.tar 2.json is a list; the .json of a sample is an object"),
        ("2.txt", b"caf\xe9", "not UTF-8: s.tar 2.txt at byte 3: .*iconv"),
        ("2.cls", b"cat", "no whole number: s.tar 2.cls holds 'cat'; a .cls holds one whole number"),
    ],
)
def test_a_sample_that_cannot_be_read_is_a_bad_record_among_the_others(
    member: str, content: bytes, problem: str, pack: Pack, tmp_path: Path
) -> None:
    path = pack("s.tar", [("1.txt", "a"), ("2.png", b"x"), (member, content), ("2.caption", b"y"), ("3.txt", "b")])
    first, bad, last = load(path, tmp_path)
    assert (first, last) == ({"__key__": "1", "caption": "a"}, {"__key__": "3", "caption": "b"})
    assert isinstance(bad, BadRecord) and re.match(problem, bad.reason)
    assert list(load_webdataset_from(1, path, extract_to=tmp_path / "out")) == [bad, last]


def test_a_text_cannot_take_the_place_of_what_the_reader_keeps(pack: Pack, tmp_path: Path) -> None:
    names = ["__images__", "__key__", "__bad__", "__json__"]
    path = pack("s.tar", [*((f"1.{name}.txt", "x") for name in names), ("1.png", b"p"), ("1.json", "{}")])
    (record,) = load(path, tmp_path)
    assert Path(record.pop("image")).read_bytes() == b"p"
    assert record == {"__key__": "1", "__skipped__": [f"1.{name}.txt" for name in names]}


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
@pytest.mark.parametrize("keep", [0, 300, 700, 1024, 1536, 2048, 2500])
def test_a_shard_cut_off_anywhere_is_refused_and_leaves_nothing(
    name: str, keep: int, pack: Pack, tmp_path: Path
) -> None:
    path = pack(name, [("1.png", os.urandom(1000)), ("2.png", os.urandom(900))])
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if name == "s.tar" else keep * len(whole) // 3000])
    with pytest.raises(DataError, match=rf"{name}: damaged or cut off: .*download it again"):
        load(path, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_shard_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.tar: cannot be read: No such file"):
        load(tmp_path / "nowhere.tar", tmp_path)
    with pytest.raises(DataError, match="extract_to is missing; name a folder"):
        webdataset_files(tmp_path / "a.tar")
    with pytest.raises(DataError, match="counts down"):
        webdataset_files("s-{3..1}.tar", tmp_path)


def test_an_unpacked_folder_moves_with_its_images(pack: Pack, tmp_path: Path) -> None:
    path = pack("s.tar", [("1.png", b"x"), ("1.txt", "x")])
    load(path, tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    (record,) = load_webdataset(path, extract_to=tmp_path / "moved")
    assert Path(record["image"]).parent == unpacked(path, tmp_path / "moved") / "images"
    assert Path(record["image"]).read_bytes() == b"x"


def test_the_source_is_offered() -> None:
    assert load_plugins().datasets.get("webdataset").load_from is load_webdataset_from

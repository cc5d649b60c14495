"""Pictures that rows hold as bytes: written to a folder once, and trained on by their paths."""

import hashlib
import io
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoTokenizer

from mmft.config import Data, Dataset, use
from mmft.data.dataset import prepare
from mmft.data.tokenize import Tokenizer
from mmft.errors import DataError
from mmft.images import FORMATS, open_image
from mmft.plugins import Plugins
from mmft.types import BadRecord
from mmft_plugins._pictures import NO_PICTURE, STARTS, picture_suffix, with_paths
from mmft_plugins.tables import load_parquet, load_parquet_from

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def picture(number: int = 0, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (number % 256, number // 256, 0)).save(out, kind)
    return out.getvalue()


def one(value: Any, folder: Path | None) -> Any:
    (record,) = with_paths([("a.parquet row 1", {"image": value, "text": "x"})], folder)
    if isinstance(record, BadRecord):
        return record
    assert record["text"] == "x"
    return record["image"]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "AVIF"])
def test_a_picture_keeps_its_bytes_and_gets_the_suffix_of_its_format(kind: str, tmp_path: Path) -> None:
    data = picture(7, kind)
    path = Path(one(data, tmp_path / "out"))
    assert path.is_absolute() and path.read_bytes() == data
    assert path.stem == hashlib.sha256(data).hexdigest()[:32]
    assert path.suffix[1:] == {"JPEG": "jpg"}.get(kind, kind.lower())
    assert open_image(path).size == (4, 3)


def test_every_format_that_can_be_opened_is_known() -> None:
    assert {"JPEG" if suffix == "jpg" else suffix.upper() for suffix in STARTS} == set(FORMATS)
    assert picture_suffix(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B") == "avif"
    assert picture_suffix(b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf") == "avif"
    assert picture_suffix(b"\0\0\0\x20ftypmif1\0\0\0\0mif1heicmiaf") is None


def test_bytes_are_found_as_a_column_a_struct_a_list_and_deep_inside_messages(tmp_path: Path) -> None:
    a, b = picture(1), picture(2)
    paths = [one(a, tmp_path), one(b, tmp_path)]
    assert paths[0] != paths[1]
    assert one({"bytes": a, "path": "coco/1.jpg"}, tmp_path) == paths[0]
    assert one([{"bytes": a, "path": None}, {"bytes": b, "path": None}], tmp_path) == paths
    assert one([a, b], tmp_path) == paths
    parts = [{"type": "image", "image": {"bytes": b, "path": None}}, {"type": "text", "text": "What?"}]
    (message,) = one([{"role": "user", "content": parts}], tmp_path)
    assert message == {"role": "user", "content": [{"type": "image", "image": paths[1]}, parts[1]]}


@pytest.mark.parametrize("given", [True, False])
def test_a_struct_without_bytes_is_its_path(given: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out" if given else None
    assert one({"bytes": None, "path": "coco/1.jpg"}, folder) == "coco/1.jpg"
    assert one({"bytes": None, "path": None}, folder) is None
    for other in ({"bytes": 12, "path": "a.txt"}, {"path": "a.txt"}, None, 3, "text", ["a", None]):
        assert one(other, folder) == other
    assert not (tmp_path / "out").exists()


NOT_PICTURES = (b"", b"BM", b"BMW is a car company and more", b"P5", b"RIFF....WAVEfmt ", b"ID3\x04", b"%PDF-1.7")


@pytest.mark.parametrize("data", NOT_PICTURES)
def test_bytes_that_are_no_picture_make_a_bad_record_and_no_file(data: bytes, tmp_path: Path) -> None:
    bad = one({"bytes": data, "path": "really.png"}, tmp_path)
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith(f"{NO_PICTURE}: a.parquet row 1 'image' holds {len(data)} bytes")
    assert "allowed are png, jpg, webp" in bad.reason and "columns" in bad.reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", NOT_PICTURES)
def test_other_bytes_are_passed_on_where_no_folder_is_named(data: bytes) -> None:
    assert one(data, None) == data
    assert one([{"bytes": data, "path": None}], None) == [{"bytes": data, "path": None}]


def test_a_picture_without_extract_to_is_one_line_that_says_to_name_it() -> None:
    for value in (picture(), {"bytes": picture(), "path": None}, [picture()]):
        with pytest.raises(DataError, match=r"^a.parquet row 1 'image' holds a picture as bytes.*extract_to.*columns"):
            one(value, None)


def test_a_picture_is_written_once_and_again_where_its_file_is_not_whole(tmp_path: Path) -> None:
    path = Path(one(picture(), tmp_path))
    os.utime(path, (1, 1))
    one(picture(), tmp_path)
    assert path.stat().st_mtime == 1
    path.write_bytes(b"")  # as a machine leaves it that lost its power
    one(picture(), tmp_path)
    assert path.read_bytes() == picture()
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match=r"extract_to: .*out.* cannot be (written|read): "):
        one(picture(), tmp_path / "out")


EXTRACT = """
import json, sys, time
from mmft_plugins.tables import load_parquet
while time.time() < float(sys.argv[3]):
    pass
print(json.dumps([record["image"] for record in load_parquet(sys.argv[1], extract_to=sys.argv[2])]))
"""


def test_two_processes_write_the_same_pictures_at_once(tmp_path: Path) -> None:
    import time

    pictures = [picture(number) for number in range(400)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet")
    command = [sys.executable, "-c", EXTRACT, str(tmp_path / "a.parquet"), str(tmp_path / "out"), str(time.time() + 2)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (json.loads(process.communicate()[0]) for process in running)
    assert first == second
    assert [Path(path).read_bytes() for path in first] == pictures
    assert {str(file) for file in (tmp_path / "out").rglob("*") if file.is_file()} == set(first)


def shards(folder: Path) -> Path:
    """Two files of rows as `datasets` uploads them: 5 and 4 records, one of them with bytes that are no picture."""
    folder.mkdir()
    for shard, numbers in enumerate((range(5), range(5, 9))):
        rows = [
            {
                "id": str(n),
                "image": {"bytes": b"not a picture" if n == 6 else picture(n % 3), "path": None},
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": f"Colour {n}."},
                ],
            }
            for n in numbers
        ]
        turns = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
        schema = pa.schema({"id": pa.string(), "image": STRUCT, "conversations": turns})
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{shard}.parquet", row_group_size=2)
    return folder


def test_a_resumed_reading_gives_the_same_paths(tmp_path: Path) -> None:
    folder, out = shards(tmp_path / "data"), tmp_path / "out"
    whole = list(load_parquet(folder, extract_to=out))
    assert len({record["image"] for record in whole if not isinstance(record, BadRecord)}) == 3
    for start in range(11):
        assert list(load_parquet_from(start, folder, extract_to=out)) == list(islice(whole, start, None))


def test_parquet_with_pictures_as_bytes_is_prepared_with_the_llava_map(
    tmp_path: Path, plugins: Plugins, tiny_llm_path: Path
) -> None:
    source = use("parquet", path=shards(tmp_path / "data"), extract_to=tmp_path / "out")
    data = Data(
        datasets=(Dataset(source=source, data_map="llava"),),
        chat_template="chatml",
        max_length=512,
        max_bad_fraction=0.2,
    )
    tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), 4)
    store = prepare(data, plugins, tokenizer, tmp_path / "cache")
    assert len(store) == 8 and store.num_records == 9
    (drop,) = store.drops
    assert (drop.record, drop.action) == (7, "dropped")
    assert drop.reason.startswith(f"{NO_PICTURE}: 1.parquet row 2 'image' holds 13 bytes that begin b'not a pictur'")
    found = [Path(sample.images[0].source).read_bytes() for sample in (store[item] for item in range(8))]
    assert found == [picture(n % 3) for n in range(9) if n != 6]
    reports: list[str] = []
    prepare(data, plugins, tokenizer, tmp_path / "cache", reports.append)
    assert len(reports) == 1 and reports[0].endswith("(unchanged)")


def test_rows_with_pictures_are_read_few_at_a_time(tmp_path: Path) -> None:
    data = picture() + os.urandom(1_000_000)
    table = pa.table({"image": [data + bytes([n]) for n in range(150)]})
    pq.write_table(table, tmp_path / "a.parquet", write_batch_size=1, use_dictionary=False)  # a page is a picture
    del table
    before, most = pa.total_allocated_bytes(), 0
    for _ in islice(load_parquet(tmp_path / "a.parquet", extract_to=tmp_path / "out"), 80):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 90e6

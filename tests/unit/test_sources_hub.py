"""The `hf` and `modelscope` sources, with data sets on disk: no test reaches a hub."""

import io
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from PIL import Image

from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft_plugins.hub import hf_files, load_hf, load_hf_from, load_modelscope

ROWS = [{"id": str(n), "turns": [{"role": "user", "content": f"question {n}"}]} for n in range(7)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_folder_gives_its_rows_in_order(saved: Path) -> None:
    assert list(load_hf(str(saved))) == ROWS
    assert {file.name for file in hf_files(str(saved))} >= {"state.json", "data-00000-of-00001.arrow"}


def test_random_access_gives_what_reading_on_gives(saved: Path) -> None:
    for start in (0, 1, 6, 7, 9):
        assert list(load_hf_from(start, str(saved))) == list(islice(load_hf(str(saved)), start, None))


def test_a_split_of_a_saved_folder_is_chosen_by_name(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:5]), "test": datasets.Dataset.from_list(ROWS[5:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert list(load_hf(str(tmp_path / "saved"), split="test")) == ROWS[5:]
    with pytest.raises(DataError, match="no split 'tset'; splits found: 'train', 'test'"):
        list(load_hf(str(tmp_path / "saved"), split="tset"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_data_files_is_read_as_on_the_hub(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "repo" / "train.parquet")
    assert list(load_hf(str(tmp_path / "repo"), streaming=streaming)) == ROWS
    assert list(load_hf_from(5, str(tmp_path / "repo"), streaming=streaming)) == ROWS[5:]


def test_a_clone_without_git_lfs_is_said_to_be_one(tmp_path: Path) -> None:
    pointer = tmp_path / "repo" / "data" / "train-00000-of-00001.parquet"
    pointer.parent.mkdir(parents=True)
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError) as refused:
        list(load_hf(str(tmp_path / "repo")))
    assert str(refused.value) == (
        f"{pointer}: not the file itself: a Git LFS pointer to it; fetch it with: git lfs pull"
    )


def picture(red: int, quality: int = 30) -> bytes:
    """A JPEG that no second encoding would give again."""
    out = io.BytesIO()
    Image.effect_noise((16, 16), red).convert("RGB").save(out, "JPEG", quality=quality)
    return out.getvalue()


def with_pictures(folder: Path) -> tuple[datasets.Dataset, list[bytes]]:
    """Rows with a picture, a list of pictures, and pictures inside messages; and the bytes of the pictures."""
    pictures = [picture(40 * n + 1) for n in range(3)]
    images = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures)]
    rows = [
        {"image": one, "images": images, "turns": [{"role": "user", "content": [{"image": one}]}], "text": "x"}
        for one in images
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "turns": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.List({"image": datasets.Image()})}
            ),
            "text": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_list(rows, features=features), pictures


@pytest.mark.parametrize("how", ["saved", "files", "streaming"])
def test_pictures_keep_their_bytes_wherever_they_lie(how: str, tmp_path: Path) -> None:
    rows, pictures = with_pictures(tmp_path)
    path, out = tmp_path / "set", tmp_path / "out"
    if how == "saved":
        rows.save_to_disk(path)
    else:
        rows.to_parquet(path / "train.parquet")
    records: list[Any] = list(load_hf(str(path), streaming=how == "streaming", extract_to=out))
    assert [Path(record["image"]).read_bytes() for record in records] == pictures
    for record in records:
        assert [Path(image).read_bytes() for image in record["images"]] == pictures
        assert record["turns"] == [{"role": "user", "content": [{"image": record["image"]}]}]
    for start in range(5):
        resumed = load_hf_from(start, str(path), streaming=how == "streaming", extract_to=out)
        assert list(resumed) == records[start:]
    assert len([file for file in out.rglob("*") if file.is_file()]) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_without_extract_to_are_refused_and_may_be_left_out(streaming: bool, tmp_path: Path) -> None:
    with_pictures(tmp_path)[0].to_parquet(tmp_path / "set" / "train.parquet")
    path = str(tmp_path / "set")
    with pytest.raises(DataError, match=r"set row 1 'image' holds a picture as bytes.*extract_to.*columns"):
        next(iter(load_hf(path, streaming=streaming)))
    assert (
        list(load_hf(path, streaming=streaming, columns=["text"], rename={"text": "output"})) == [{"output": "x"}] * 3
    )
    with pytest.raises(DataError, match="set: no column 'txt'; columns found: 'image', 'images', 'turns', 'text'"):
        list(load_hf(path, streaming=streaming, columns=["txt"]))


def test_pictures_do_not_go_among_the_files_of_the_data_set(saved: Path) -> None:
    for call in (hf_files, load_hf):
        with pytest.raises(
            DataError, match=r"extract_to: .*images lies inside the data set .*saved; name a folder outside"
        ):
            list(call(str(saved), extract_to=saved / "images"))


def test_json_columns_and_a_saved_format_are_read_as_rows_of_python(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text('{"a": 1, "b": {"x": 1}}\n{"a": 2, "b": "s"}\n')
    for streaming in (False, True):
        found = list(load_hf(str(tmp_path / "repo"), streaming=streaming))
        assert found == [{"a": 1, "b": {"x": 1}}, {"a": 2, "b": "s"}]
    datasets.Dataset.from_dict({"a": [[1, 2]]}).with_format("numpy").save_to_disk(tmp_path / "saved")
    assert list(load_hf(str(tmp_path / "saved"))) == [{"a": [1, 2]}]


def test_a_data_set_that_cannot_be_found_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 'hf': 'nobody/nothing' cannot be loaded: .*check the name"):
        list(load_hf("nobody/nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"source 'hf': '.*empty' cannot be loaded: "):
        list(load_hf(str(tmp_path / "empty")))


def test_modelscope_gives_the_same_records_as_hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pictures = with_pictures(tmp_path)

    class MsDataset:
        """modelscope is large and not installed for tests; this much of it is used."""

        @staticmethod
        def load(path: str, **options: Any) -> "MsDataset":
            assert (path, options) == ("somebody/set", {"split": "train", "use_streaming": False, "version": "v1"})
            return MsDataset()

        def to_hf_dataset(self) -> datasets.Dataset:
            return rows

    module = ModuleType("modelscope.msdatasets")
    module.MsDataset = MsDataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
    options: dict[str, Any] = {"columns": ["image"], "rename": {"image": "picture"}, "extract_to": tmp_path / "out"}
    records: list[Any] = list(load_modelscope("somebody/set", revision="v1", **options))
    assert [Path(record.pop("picture")).read_bytes() for record in records] == pictures
    assert records == [{}, {}, {}]


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "modelscope"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from mmft.errors import DataError
from mmft_plugins import hub
for call in (hub.hf_files, hub.load_hf, hub.modelscope_files, hub.load_modelscope):
    try:
        list(call("name"))
    except DataError as error:
        print(error)
"""


def test_without_the_extras_the_error_names_what_to_install() -> None:
    ran = subprocess.run([sys.executable, "-c", BLOCKED], check=False, capture_output=True, text=True)
    assert ran.stdout.splitlines() == [
        f"source {name!r} needs the package {package!r}, which is missing: pip install 'mmft[{name}]'"
        for name, package in (("hf", "datasets"), ("modelscope", "modelscope"))
        for _ in range(2)
    ], ran.stderr


def test_the_hubs_are_offered() -> None:
    found = load_plugins().datasets
    assert found.get("hf").load_from is load_hf_from and found.get("modelscope").load is load_modelscope

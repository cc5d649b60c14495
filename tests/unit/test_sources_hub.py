"""The `hf` and `modelscope` sources, with data sets on disk: no test reaches a hub."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

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


def test_images_stay_bytes(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (2, 2))], "text": ["x"]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    (record,) = load_hf(str(tmp_path / "saved"))
    assert record["image"]["bytes"].startswith(b"\x89PNG") and record["text"] == "x"


def test_a_data_set_that_cannot_be_found_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 'hf': 'nobody/nothing' cannot be loaded: .*check the name"):
        list(load_hf("nobody/nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"source 'hf': '.*empty' cannot be loaded: "):
        list(load_hf(str(tmp_path / "empty")))


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

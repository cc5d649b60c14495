"""The cache of token stores, and which image files a record may name."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mmft.config import Data, Dataset, use
from mmft.data import digest
from mmft.data.dataset import prepare
from mmft.data.store import TokenStore
from mmft.data.tokenize import Tokenizer
from mmft.errors import DataError
from mmft.plugins import Plugins, load_plugins
from mmft.testing import tiny_tokenizer
from mmft.types import Image

MAP = """
from mmft import Conversation, DataMap, Message, Text, hookimpl

def read(record):
    return Conversation((Message("user", (Text("q"),)), Message("assistant", (Text("EXTRA" + record["a"]),))))

@hookimpl
def mmft_data_maps():
    return [DataMap(name="acme", fn=read)]
"""


@dataclass
class Case:
    """A dataset and everything its store depends on; `prepare()` says whether the store came from the cache."""

    folder: Path
    tokenizer: Tokenizer
    plugins: Plugins
    data: Data
    said: list[str] = field(default_factory=list)

    def prepare(self) -> TokenStore:
        return prepare(self.data, self.plugins, self.tokenizer, self.folder / "cache", self.said.append)

    @property
    def hit(self) -> bool:
        return self.said[-1].endswith("(unchanged)")

    def first(self) -> str:
        return str(self.tokenizer.hf.decode(self.prepare()[0].input_ids.tolist()))

    def change(self, **options: Any) -> None:
        self.data = Data.model_validate({**self.data.model_dump(), **options})


@pytest.fixture
def case(tmp_path: Path, install: Callable[..., Path], tiny_llm_path: Path) -> Case:
    install("acme-mmft", "1", {"acme": "acme_mod"}, acme_mod=MAP.replace("EXTRA", "one "))
    (tmp_path / "a.json").write_text(json.dumps([{"a": "x"}, {"a": "y"}]), "utf-8")
    dataset = Dataset(source=use("json", path=str(tmp_path / "a.json")), data_map="acme")
    data = Data(datasets=(dataset,), chat_template="chatml", max_length=256)
    tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))
    return Case(tmp_path, tokenizer, load_plugins(), data)


def test_an_unchanged_store_is_read_again_and_equal(case: Case) -> None:
    first = case.prepare()
    assert not case.hit
    case.plugins = load_plugins()
    again = case.prepare()
    assert case.hit
    assert again.ids.tolist() == first.ids.tolist() and again.loss.tolist() == first.loss.tolist()
    assert again.drops == first.drops and again.index.tolist() == first.index.tolist()


def test_other_data_makes_another_store(case: Case) -> None:
    case.prepare()
    (case.folder / "a.json").write_text(json.dumps([{"a": "z"}, {"a": "y"}]), "utf-8")  # as many bytes
    assert "one z" in case.first() and not case.hit


def test_another_map_code_makes_another_store_without_a_new_version(case: Case) -> None:
    assert "one x" in case.first()
    site = case.folder / "site" / "acme-mmft"
    (site / "acme_mod.py").write_text(MAP.replace("EXTRA", "two "), "utf-8")
    shutil.rmtree(site / "__pycache__", ignore_errors=True)
    del sys.modules["acme_mod"]
    case.plugins = load_plugins()
    assert "two x" in case.first() and not case.hit


@pytest.mark.parametrize(
    "options",
    [
        {"chat_template": "vicuna"},
        {"max_length": 255},
        {"too_long": "truncate"},
        {"datasets": ["limit", 1]},
        {"datasets": ["system", "Briefly."]},
    ],
)
def test_another_setting_that_changes_the_tokens_makes_another_store(case: Case, options: dict[str, Any]) -> None:
    case.prepare()
    if "datasets" in options:
        key, value = options["datasets"]
        options = {"datasets": [{**case.data.datasets[0].model_dump(), key: value}]}
    case.change(**options)
    case.prepare()
    assert not case.hit


@pytest.mark.parametrize("options", [{"num_workers": 3}, {"packing": True}, {"max_bad_fraction": 0.5}])
def test_a_setting_that_does_not_change_the_tokens_keeps_the_store(case: Case, options: dict[str, Any]) -> None:
    case.prepare()
    case.change(**options)
    case.prepare()
    assert case.hit


def test_repeat_is_applied_to_a_cached_store(case: Case) -> None:
    case.prepare()
    case.change(datasets=[{**case.data.datasets[0].model_dump(), "repeat": 3}])
    assert len(case.prepare()) == 6 and case.hit


def test_another_tokenizer_makes_another_store(case: Case, tmp_path: Path) -> None:
    case.prepare()
    folder = tiny_tokenizer(tmp_path / "other", special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|new|>"))
    case.tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(folder))
    case.prepare()
    assert not case.hit


def test_the_same_tokenizer_with_another_eos_makes_another_store(case: Case) -> None:
    """A document ends in eos, so the ids differ although the vocabulary does not."""
    (case.folder / "a.json").write_text(json.dumps([{"text": "x"}]), "utf-8")
    case.change(datasets=[{**case.data.datasets[0].model_dump(), "data_map": "pretrain"}])
    assert case.first() == "x<|im_end|>"
    case.tokenizer.hf.eos_token = "<|endoftext|>"
    assert case.first() == "x<|endoftext|>" and not case.hit


def test_a_model_that_sees_has_a_store_of_its_own(case: Case, tiny_llm_path: Path) -> None:
    case.prepare()
    case.tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), 4)
    case.prepare()
    assert not case.hit
    case.tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), 9)
    case.prepare()
    assert not case.hit


def test_a_build_that_was_cut_short_is_not_taken_for_a_store(case: Case) -> None:
    case.change(too_long="error", max_length=8)
    for _ in range(2):
        with pytest.raises(DataError, match="longer than 8 tokens"):
            case.prepare()
        assert not case.hit


def test_a_build_that_fails_leaves_nothing_behind(case: Case) -> None:
    case.change(too_long="error", max_length=8)
    with pytest.raises(DataError):
        case.prepare()
    assert list((case.folder / "cache").glob("*")) == []


def seeing(case: Case, tiny_llm_path: Path, image: Any, image_folder: Path | None) -> TokenStore:
    """The store of one record with this image and one without."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    records = [{"image": image, "conversations": turns}, {"conversations": turns}]
    (case.folder / "a.json").write_text(json.dumps(records), "utf-8")
    dataset = {**case.data.datasets[0].model_dump(), "data_map": "llava", "image_folder": image_folder}
    case.change(datasets=[dataset], max_bad_fraction=1.0)
    case.tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), 4)
    return case.prepare()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sub/cat.png, a file beside it, and the working directory in it."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "cat.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2" / "cat.png").write_bytes(b"")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", ["sub/cat.png", "./sub/cat.png", "sub/../sub/cat.png"])
@pytest.mark.parametrize("relative", [False, True])
def test_an_image_below_the_image_folder_is_found(
    case: Case, images: Path, tiny_llm_path: Path, path: str, relative: bool
) -> None:
    store = seeing(case, tiny_llm_path, path, Path() if relative else images)
    assert store.drops == () and Path(store[0].images[0].source).resolve() == images / "sub" / "cat.png"


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "ABSOLUTE", "../images2/cat.png"])
@pytest.mark.parametrize("folder", ["images", "", "sub/.."])
def test_an_image_path_may_not_leave_the_image_folder(
    case: Case, images: Path, tiny_llm_path: Path, path: str, folder: str
) -> None:
    path = path.replace("ABSOLUTE", str(case.folder / "secret.png"))
    store = seeing(case, tiny_llm_path, path, images if folder == "images" else Path(folder))
    assert [drop.reason for drop in store.drops] == [f"image path leaves the image folder: {path}"]


@pytest.mark.parametrize(
    "path", ["http://a.example/cat.png", "https://a.example/c.png", "file:///etc/passwd", "s3://b"]
)
@pytest.mark.parametrize("with_folder", [False, True])
def test_a_remote_image_is_refused(case: Case, images: Path, tiny_llm_path: Path, path: str, with_folder: bool) -> None:
    store = seeing(case, tiny_llm_path, path, images if with_folder else None)
    assert [drop.reason for drop in store.drops] == [f"image is a remote address: {path}; only local files are read"]


def test_a_missing_image_names_the_whole_path(case: Case, images: Path, tiny_llm_path: Path) -> None:
    store = seeing(case, tiny_llm_path, "dog.png", images)
    assert [drop.reason for drop in store.drops] == [f"image not found: {images / 'dog.png'}"]
    assert [drop.reason for drop in seeing(case, tiny_llm_path, "sub", images).drops] == [
        f"image not found: {images / 'sub'}"
    ]


def test_an_image_that_was_missing_is_used_once_it_is_there(case: Case, images: Path, tiny_llm_path: Path) -> None:
    """Else a run that was refused for missing images is refused for ever."""
    assert len(seeing(case, tiny_llm_path, "dog.png", images)) == 1
    (images / "dog.png").write_bytes(b"")
    store = case.prepare()
    assert len(store) == 2 and store[0].images == (Image(str(images / "dog.png")),)


def test_a_picture_for_a_text_model_is_dropped_with_the_reason(case: Case, images: Path, tiny_llm_path: Path) -> None:
    seeing(case, tiny_llm_path, "sub/cat.png", images)
    case.tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))
    assert [drop.reason for drop in case.prepare().drops] == ["has an image, but the model has no vision encoder"]


def test_a_file_that_has_settled_is_hashed_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    file = case.folder / "a.json"
    monkeypatch.setattr(digest, "SETTLED", -1.0)
    notes = case.folder / "notes.json"
    hashes = digest.FileHashes(notes)
    first = hashes.of(file)
    hashes.save()
    again = digest.FileHashes(notes)
    again.known[str(file.resolve())][-1] = "noted"
    assert again.of(file) == "noted" != first
    file.write_text("[{}]", "utf-8")
    assert again.of(file) not in ("noted", first)


def test_a_file_written_just_now_is_not_noted(case: Case) -> None:
    """It may change again within the same tick of the clock, with as many bytes."""
    hashes = digest.FileHashes(case.folder / "notes.json")
    hashes.of(case.folder / "a.json")
    hashes.save()
    assert not (case.folder / "notes.json").exists()


def test_damaged_notes_cost_a_hash_and_nothing_else(case: Case) -> None:
    (case.folder / "notes.json").write_text("{", "utf-8")
    assert len(digest.FileHashes(case.folder / "notes.json").of(case.folder / "a.json")) == 64


def test_each_sample_knows_its_file_and_record(case: Case) -> None:
    other = case.folder / "b.json"
    other.write_text(json.dumps([{"x": 1}, {"a": "z"}]), "utf-8")
    one = case.data.datasets[0].model_dump()
    second = {**one, "source": use("json", path=str(other))}
    case.change(datasets=[one, second], max_bad_fraction=1.0)
    store = case.prepare()
    origins = [(store[item].source, store[item].record) for item in range(3)]  # type: ignore[attr-defined]
    first = str(case.folder / "a.json")
    assert origins == [(first, 1), (first, 2), (str(other), 2)]

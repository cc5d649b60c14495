"""Records to a token store: every record is kept or listed with its reason, and a stale store is never used."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mmft.config import Data, Dataset, use
from mmft.data.cut import truncate
from mmft.data.dataset import prepare
from mmft.data.store import Drop, TokenStore, drop_summary
from mmft.data.tokenize import Tokenizer, tokenize
from mmft.errors import DataError
from mmft.plugins import Plugins, load_plugins
from mmft.types import Image, Segment, TokenizedSample

PATCHES = 4


@pytest.fixture(scope="session")
def tokenizer(tiny_llm_path: Path) -> Tokenizer:
    """Of a text model."""
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))


@pytest.fixture(scope="session")
def seeing(tiny_llm_path: Path) -> Tokenizer:
    """Of a model that takes four tokens an image."""
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), PATCHES)


def qa(answer: str, question: str = "What is it?", **extra: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **extra}


def write(path: Path, records: Any) -> str:
    path.write_text(json.dumps(records), "utf-8")
    return str(path)


def data_of(*datasets: Dataset, **options: Any) -> Data:
    return Data(datasets=datasets, **{"chat_template": "chatml", "max_length": 512, "max_bad_fraction": 1.0, **options})


class Stores:
    """Prepare stores below one folder."""

    def __init__(self, folder: Path, plugins: Plugins) -> None:
        self.folder, self.plugins = folder, plugins

    def __call__(self, data: Data, tokenizer: Tokenizer, plugins: Plugins | None = None) -> TokenStore:
        return prepare(data, plugins or self.plugins, tokenizer, self.folder / "cache")


@pytest.fixture
def stores(tmp_path: Path, plugins: Plugins) -> Stores:
    return Stores(tmp_path, plugins)


def llava(path: str, **options: Any) -> Dataset:
    return Dataset(source=use("json", path=path), data_map="llava", **options)


def reasons(store: TokenStore) -> list[str]:
    return [drop.reason for drop in store.drops]


def decoded(store: TokenStore, item: int, tokenizer: Tokenizer) -> str:
    return str(tokenizer.hf.decode(store[item].input_ids.tolist()))


def test_what_is_stored_is_what_the_template_and_tokenizer_give(
    tmp_path: Path, stores: Stores, plugins: Plugins, tokenizer: Tokenizer
) -> None:
    records = [qa("A cat."), qa("A dog.", "And this?"), qa("Neither.")]
    store = stores(data_of(llava(write(tmp_path / "a.json", records))), tokenizer)
    template, data_map = plugins.chat_templates.get("chatml"), plugins.data_maps.get("llava")
    for item, record in enumerate(records):
        expected = tokenize(template.render(data_map.fn(record)), tokenizer)  # type: ignore[arg-type]
        assert store[item].input_ids.tolist() == expected.input_ids.tolist()
        assert store[item].loss_mask.tolist() == expected.loss_mask.tolist()
        assert store.lengths[item] == len(expected)
    assert len(store) == store.num_records == 3 and store.drops == ()


def test_each_drop_is_listed_with_file_record_id_and_reason(
    tmp_path: Path, stores: Stores, tokenizer: Tokenizer
) -> None:
    records = [qa("A cat."), {"id": "two"}, qa("", id=3), qa("Yes.", image="cat.png", id="four")]
    path = write(tmp_path / "a.json", records)
    store = stores(data_of(llava(path, image_folder=tmp_path)), tokenizer)
    assert len(store) == 1 and store.num_records == 4
    assert [(drop.source, drop.record, drop.id, drop.action) for drop in store.drops] == [
        (path, 2, "two", "dropped"),
        (path, 3, "3", "dropped"),
        (path, 4, "four", "dropped"),
    ]
    assert reasons(store)[0].startswith("'conversations' is missing")
    assert reasons(store)[1].startswith("nothing to train: ")
    assert reasons(store)[2] == f"image not found: {tmp_path / 'cat.png'}"
    assert str(store.drops[0]).startswith(f"{path} record 2 (id \"two\"): 'conversations' is missing")


def test_drops_are_counted_by_kind_of_reason() -> None:
    drops = [Drop("a.json", n, "", f"image not found: {n}.png") for n in range(9)]
    drops += [Drop("a.json", 9, "", "nothing to train"), Drop("a.json", 10, "", "longer than 8 tokens: 9", "truncated")]
    assert drop_summary(drops, 1234) == (
        "dropped 10 of 1,234 records: 9 image not found, 1 nothing to train\n"
        "truncated 1 of 1,234 records: 1 longer than 8 tokens"
    )


def test_a_place_inside_the_record_is_no_kind_of_its_own() -> None:
    drops = [Drop("a.json", n, "", f"conversations[{n}]: 'value' is missing: found from") for n in range(3)]
    assert drop_summary(drops, 9) == "dropped 3 of 9 records: 3 conversations[]: 'value' is missing"


MAP = """
from mmft import Conversation, DataMap, Message, Text, hookimpl

def read(record):
    BODY
    return Conversation((Message("user", (Text("q"),)), Message("assistant", (Text("EXTRA" + record["a"]),))))

@hookimpl
def mmft_data_maps():
    return [DataMap(name="acme", fn=read)]
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("record['x']", "data map 'acme' failed: KeyError: 'x'"),
        ("int('x')", "data map 'acme' failed: ValueError: invalid literal for int() with base 10: 'x'"),
        ("record.x", "data map 'acme' failed: AttributeError: 'dict' object has no attribute 'x'"),
        ("'x' + 1", "data map 'acme' failed: TypeError: "),
        ("[][0]", "data map 'acme' failed: IndexError: list index out of range"),
        ("return 7", "data map 'acme' gave an int, "),
    ],
)
def test_a_map_that_fails_on_a_record_drops_it_with_the_maps_name_and_the_error(
    install: Callable[..., Path], tmp_path: Path, stores: Stores, tokenizer: Tokenizer, body: str, reason: str
) -> None:
    install("acme-mmft", "1", {"acme": "acme_mod"}, acme_mod=MAP.replace("BODY", f"if record['a'] == 'b': {body}"))
    source = use("json", path=write(tmp_path / "a.json", [{"a": "a"}, {"a": "b"}]))
    store = stores(data_of(Dataset(source=source, data_map="acme")), tokenizer, load_plugins())
    assert len(store) == 1 and store.drops[0].record == 2
    assert store.drops[0].reason.startswith(reason), store.drops[0].reason


@pytest.mark.parametrize(("allowed", "runs"), [(0.25, True), (0.2, False), (0.0, False), (1.0, True)])
def test_more_dropped_records_than_allowed_stop_the_run_and_the_first_are_shown(
    tmp_path: Path, stores: Stores, tokenizer: Tokenizer, allowed: float, runs: bool
) -> None:
    path = write(tmp_path / "a.json", [qa("A cat.")] * 3 + [{"id": "bad"}])
    data = data_of(llava(path), max_bad_fraction=allowed)
    if runs:
        assert len(stores(data, tokenizer)) == 3
        return
    with pytest.raises(DataError) as caught:
        stores(data, tokenizer)
    text = str(caught.value)
    assert text.startswith("dropped 1 of 4 records: 1 'conversations' is missing")
    assert f"at most {allowed:.1%} is allowed (data.max_bad_fraction)" in text and f'{path} record 4 (id "bad")' in text


@pytest.mark.parametrize("records", [[], [{"id": "bad"}]])
def test_a_run_with_nothing_left_stops(tmp_path: Path, stores: Stores, tokenizer: Tokenizer, records: Any) -> None:
    with pytest.raises(DataError, match=r"the datasets are empty|dropped 1 of 1 records"):
        stores(data_of(llava(write(tmp_path / "a.json", records))), tokenizer)


def long_and_short(tmp_path: Path) -> str:
    return write(tmp_path / "a.json", [qa("yes"), qa("no " * 60, id="long")])


def test_too_long_drop_leaves_the_sample_out_with_both_lengths(
    tmp_path: Path, stores: Stores, tokenizer: Tokenizer
) -> None:
    store = stores(data_of(llava(long_and_short(tmp_path)), max_length=64), tokenizer)
    assert len(store) == 1 and [drop.action for drop in store.drops] == ["dropped"]
    assert store.drops[0].reason.startswith("longer than 64 tokens: ") and store.drops[0].id == "long"


def test_too_long_truncate_keeps_the_first_tokens_and_lists_the_repair(
    tmp_path: Path, stores: Stores, tokenizer: Tokenizer
) -> None:
    data = data_of(llava(long_and_short(tmp_path)), max_length=64, too_long="truncate", max_bad_fraction=0.0)
    store = stores(data, tokenizer)
    whole = stores(data_of(llava(long_and_short(tmp_path))), tokenizer)[1]
    assert [drop.action for drop in store.drops] == ["truncated"]
    assert store[1].input_ids.tolist() == whole.input_ids[:64].tolist()
    assert store[1].loss_mask.tolist() == whole.loss_mask[:64].tolist()


def test_too_long_error_stops_with_file_and_record(tmp_path: Path, stores: Stores, tokenizer: Tokenizer) -> None:
    path = long_and_short(tmp_path)
    with pytest.raises(DataError, match=rf"{path} record 2: longer than 64 tokens: \d+ \(data.too_long is 'error'\)"):
        stores(data_of(llava(path), max_length=64, too_long="error"), tokenizer)


def test_a_sample_of_exactly_max_length_is_kept_whole(tmp_path: Path, stores: Stores, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.json", [qa("A cat.")])
    length = int(stores(data_of(llava(path)), tokenizer).lengths[0])
    assert stores(data_of(llava(path), max_length=length), tokenizer).drops == ()
    with pytest.raises(DataError, match=f"longer than {length - 1} tokens"):
        stores(data_of(llava(path), max_length=length - 1), tokenizer)


def test_a_record_truncated_to_nothing_is_listed_once_as_dropped(
    tmp_path: Path, stores: Stores, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.json", [qa("yes"), qa("yes", "why " * 60)])
    store = stores(data_of(llava(path), max_length=48, too_long="truncate"), tokenizer)
    assert len(store) == 1
    assert [(drop.record, drop.action) for drop in store.drops] == [(2, "dropped")]


@pytest.mark.parametrize(
    ("cut", "tokens", "images"), [(1, 1, 0), (2, 1, 0), (4, 1, 0), (5, 5, 1), (6, 6, 1), (9, 6, 1), (10, 10, 2)]
)
def test_truncation_never_goes_through_an_image(seeing: Tokenizer, cut: int, tokens: int, images: int) -> None:
    a, b = Image("a.png"), Image("b.png")
    sample = tokenize([Segment("x"), Segment(a), Segment("y"), Segment(b), Segment("z", loss=True)], seeing)
    assert len(sample) == 11
    shorter = truncate(sample, cut, seeing)
    assert shorter.input_ids.tolist() == sample.input_ids[:tokens].tolist()
    assert len(shorter.loss_mask) == tokens and shorter.images == (a, b)[:images]
    assert (shorter.input_ids == seeing.image_id).sum() == PATCHES * images


def test_truncation_keeps_neighbouring_images_apart(seeing: Tokenizer) -> None:
    sample = tokenize([Segment(Image("a.png")), Segment(Image("b.png")), Segment("z", loss=True)], seeing)
    shorter = truncate(sample, 6, seeing)
    assert len(shorter) == PATCHES and shorter.images == (Image("a.png"),)


def test_repeat_limit_and_system_change_a_dataset_and_no_other(
    tmp_path: Path, stores: Stores, tokenizer: Tokenizer
) -> None:
    first = write(tmp_path / "a.json", [qa("one"), qa("two"), qa("three")])
    system = [{"from": "system", "value": "Own."}]
    second = write(tmp_path / "b.json", [qa("x"), {"conversations": [*system, *qa("y")["conversations"]]}])
    data = data_of(llava(first, limit=2, repeat=2), llava(second, system="Briefly."))
    store = stores(data, tokenizer)
    texts = [decoded(store, item, tokenizer) for item in range(len(store))]
    answers = [text.rpartition("assistant\n")[2].partition("<|im_end|>")[0] for text in texts]
    assert answers == ["one", "two", "one", "two", "x", "y"]
    assert ["Briefly." in text for text in texts] == [False, False, False, False, True, False]
    assert "Own." in texts[5] and store.num_records == 4 and len(store.lengths) == len(store.has_image) == 6


@pytest.mark.parametrize(("template", "noted"), [("chatml", True), ("qwen3", False)])
def test_thoughts_that_the_template_does_not_write_are_listed_as_a_repair(
    tmp_path: Path, stores: Stores, tokenizer: Tokenizer, template: str, noted: bool
) -> None:
    answer = {"role": "assistant", "content": "Red.", "reasoning_content": "I see red."}
    path = write(tmp_path / "talk.json", [{"messages": [{"role": "user", "content": "Which colour?"}, answer]}])
    data = data_of(Dataset(source=use("json", path=path), data_map="openai"), chat_template=template)
    store = stores(data, tokenizer)
    text = decoded(store, 0, tokenizer)
    assert ("I see red." in text, "Red." in text) == (not noted, True)
    note = "reasoning that chat template 'chatml' does not write is not trained: 1"
    assert [drop.reason for drop in store.drops] == ([note] if noted else [])
    assert not noted or store.drops[0].action == "repaired"


def test_a_document_takes_neither_template_nor_system(tmp_path: Path, stores: Stores, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.json", [{"text": "The quick fox."}])
    data = data_of(Dataset(source=use("json", path=path), data_map="pretrain", system="Briefly."))
    store = stores(data, tokenizer)
    assert decoded(store, 0, tokenizer) == "The quick fox.<|im_end|>" and store[0].loss_mask.all()


def test_a_store_reads_back_as_plain_samples(tmp_path: Path, stores: Stores, seeing: Tokenizer) -> None:
    (tmp_path / "cat.png").write_bytes(b"not opened here")
    path = write(tmp_path / "a.json", [qa("A cat.", "<image>\nWhat?", image="cat.png"), qa("Hello.")])
    store = stores(data_of(llava(path, image_folder=tmp_path)), seeing)
    assert isinstance(store[0], TokenizedSample) and store[0].input_ids.dtype == np.int32
    assert store[0].images == (Image(str(tmp_path / "cat.png")),) and store[1].images == ()
    assert store.has_image.tolist() == [True, False]
    assert "2 samples" in store.summary() and "1 images" in store.summary()
    assert replace(store, index=store.index[::-1])[1].images == store[0].images

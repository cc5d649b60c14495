"""What happens to a record that cannot be trained: stop, leave out, or take another; and never in silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from transformers import AutoTokenizer

from mmft.config import Data, Dataset, use
from mmft.data.bad_samples import BadSamples
from mmft.data.collate import BAD_SAMPLES, Collator
from mmft.data.dataset import prepare
from mmft.data.store import Drop, TokenStore
from mmft.data.tokenize import Tokenizer
from mmft.errors import CheckpointError, DataError
from mmft.plugins import Plugins
from mmft.types import IGNORE_INDEX

PER_IMAGE = 4


@pytest.fixture
def seeing(tiny_llm_path: Path) -> Tokenizer:
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), PER_IMAGE)


class Folder:
    """A data file of records and a store of it."""

    def __init__(self, folder: Path, plugins: Plugins, tokenizer: Tokenizer) -> None:
        self.folder, self.plugins, self.tokenizer = folder, plugins, tokenizer

    def store(self, records: list[Any], *, seed: int = 0, refuse: bool = True, **options: Any) -> TokenStore:
        path = self.folder / "a.json"
        path.write_text(json.dumps(records), "utf-8")
        data_map = options.pop("data_map", "llava")
        dataset = Dataset(source=use("json", path=str(path)), data_map=data_map, image_folder=self.folder)
        chosen = {"chat_template": "chatml", "max_length": 256, "max_bad_fraction": 1.0, **options}
        data = Data.model_validate({"datasets": (dataset,), **chosen})
        return prepare(data, self.plugins, self.tokenizer, self.folder / "cache", seed=seed, refuse=refuse)


@pytest.fixture
def folder(tmp_path: Path, plugins: Plugins, seeing: Tokenizer) -> Folder:
    for name in ("good", "other"):
        Pillow.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return Folder(tmp_path, plugins, seeing)


def qa(answer: str, image: str | None = None) -> dict[str, Any]:
    question = "<image>\nWhat?" if image else "What?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {})}


BAD = {"id": "bad"}


def test_error_stops_at_the_first_bad_record_and_names_it(folder: Folder) -> None:
    with pytest.raises(DataError, match=r'a\.json record 2 \(id "bad"\): .*\(data\.on_bad_sample is \'error\'\)'):
        folder.store([qa("yes"), BAD, {"id": "worse"}], on_bad_sample="error")
    assert list((folder.folder / "cache").glob("tokens-*")) == []


def test_error_stops_at_a_cached_store_too(folder: Folder) -> None:
    folder.store([qa("yes"), BAD])
    with pytest.raises(DataError, match=r"on_bad_sample is 'error'"):
        folder.store([qa("yes"), BAD], on_bad_sample="error")


def test_a_record_that_is_too_long_is_dropped_by_choice_and_is_no_error(folder: Folder) -> None:
    store = folder.store([qa("yes"), qa("no " * 300)], on_bad_sample="error", too_long="drop")
    assert len(store) == 1 and len(store.drops) == 1


def test_refuse_false_gives_the_store_however_many_are_dropped(folder: Folder) -> None:
    store = folder.store([BAD, BAD], max_bad_fraction=0.0, refuse=False)
    assert len(store) == 0 and len(store.drops) == 2 and store.num_records == 2


def test_replace_keeps_the_number_of_samples_and_is_a_function_of_the_seed(folder: Folder) -> None:
    records = [qa(str(n)) if n % 3 else BAD for n in range(30)]
    stores = [folder.store(records, seed=seed, on_bad_sample="replace") for seed in (1, 1, 2)]
    assert all(len(store) == 30 for store in stores)
    assert stores[0].index.tolist() == stores[1].index.tolist() != stores[2].index.tolist()
    assert {drop.action for drop in stores[0].drops} == {"replaced"}
    assert set(stores[0].index.tolist()) == set(range(20))


def test_too_many_replaced_records_stop_the_run_as_dropped_ones_do(folder: Folder) -> None:
    with pytest.raises(DataError, match=r"replaced 1 of 2 records.*at most 10\.0% is allowed"):
        folder.store([qa("yes"), BAD], on_bad_sample="replace", max_bad_fraction=0.1)


def test_a_wrong_format_is_answered_with_the_one_that_fits(folder: Folder) -> None:
    with pytest.raises(DataError, match=r"this looks like `llava`: it has"):
        folder.store([qa("yes", "good.png")] * 3, data_map="alpaca", max_bad_fraction=0.0)


def test_half_a_character_is_an_error_of_its_record_with_the_place(folder: Folder) -> None:
    (drop,) = folder.store([qa("yes"), qa("ab\ud83dcd")]).drops
    assert drop.record == 2 and drop.reason.startswith("lone surrogate U+D83D at character ")


def test_a_nul_character_is_text(folder: Folder) -> None:
    store = folder.store([qa("a\0b")])
    assert "a\0b" in folder.tokenizer.hf.decode(store[0].input_ids.tolist()) and store.drops == ()


def test_what_a_map_mended_is_counted_and_still_trained(folder: Folder, install: Any) -> None:
    code = """
from mmft import Conversation, DataMap, Message, Text, hookimpl

def read(record):
    turns = (Message("user", (Text("q"),)), Message("assistant", (Text(record["a"]),)))
    return Conversation(turns, notes=("a leading answer left out: 1",))

@hookimpl
def mmft_data_maps():
    return [DataMap(name="acme", fn=read)]
"""
    from mmft.plugins import load_plugins

    install("acme-mmft", "1", {"acme": "acme_mod"}, acme_mod=code)
    folder.plugins = load_plugins()
    store = folder.store([{"a": "x", "id": 7}, {"a": ""}], data_map="acme", max_bad_fraction=0.5)
    assert next((drop.record, drop.id, drop.action) for drop in store.drops) == (1, "7", "repaired")
    assert "repaired" in store.summary() and "a leading answer left out" in store.summary()


def pixels(picture: Pillow.Image) -> torch.Tensor:
    return torch.tensor(picture.getpixel((0, 0)), dtype=torch.float32)[:, None, None].expand(3, 2, 2)


def collated(store: TokenStore, policy: Any, items: list[int]) -> Any:
    collate = Collator("flat", transform=pixels, on_bad_sample=policy, store=store, seed=5)
    return collate([store[item] for item in items])


def test_a_broken_picture_is_an_error_with_file_record_and_picture(folder: Folder) -> None:
    store = folder.store([qa("yes", "good.png"), qa("no", "cut.png")])
    with pytest.raises(DataError, match=r"a\.json record 2: image cannot be read: .*cut\.png"):
        collated(store, "error", [0, 1])


def test_drop_keeps_the_row_with_no_label_and_black_pixels_and_says_so(folder: Folder) -> None:
    store = folder.store([qa("yes", "good.png"), qa("no", "cut.png")])
    batch, whole = collated(store, "drop", [0, 1]), collated(store, "drop", [0])
    assert batch["input_ids"].shape[1] == sum(store.lengths) and batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["pixel_values"][0].min() == 9 and not batch["pixel_values"][1].any()
    first = int(store.lengths[0])
    assert (
        torch.equal(batch["labels"][:, :first], whole["labels"]) and (batch["labels"][0, first:] == IGNORE_INDEX).all()
    )
    ((drop,), none) = (batch[BAD_SAMPLES], whole.get(BAD_SAMPLES))
    assert none is None and (drop.record, drop.action) == (2, "dropped")


def test_replace_takes_another_sample_that_is_not_longer_the_same_each_time(folder: Folder) -> None:
    records = [qa("n" * n, "other.png") for n in range(1, 9)] + [qa("nnnn", "cut.png")]
    store = folder.store(records)
    batches = [collated(store, "replace", [8]) for _ in range(2)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert batches[0]["input_ids"].shape[1] <= store.lengths[8] and batches[0]["pixel_values"].min() == 9
    assert (batches[0]["labels"] != IGNORE_INDEX).any() and batches[0][BAD_SAMPLES][0].action == "replaced"


def test_replace_drops_where_there_is_nothing_to_take_instead(folder: Folder) -> None:
    store = folder.store([qa("no", "cut.png"), qa("longer " * 9, "good.png")])
    batch = collated(store, "replace", [0])
    assert (batch["labels"] == IGNORE_INDEX).all() and batch[BAD_SAMPLES][0].action == "dropped"


def batch_of(samples: int, *bad: Drop) -> dict[str, Any]:
    positions = torch.from_numpy(np.tile(np.arange(3), samples))[None]
    batch: dict[str, Any] = {"input_ids": torch.zeros_like(positions), "position_ids": positions}
    return {**batch, BAD_SAMPLES: list(bad)} if bad else batch


def test_bad_samples_are_listed_once_and_taken_out_of_the_batch(tmp_path: Path) -> None:
    account = BadSamples(tmp_path / "dropped.jsonl", 0.5)
    for _ in range(2):
        batch = batch_of(3, Drop("a.json", 4, "", "image cannot be read: x"))
        account.take(batch)
        assert BAD_SAMPLES not in batch
    (line,) = (tmp_path / "dropped.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["record"] == 4 and (account.seen, account.bad) == (6, 2)


def test_too_large_a_share_of_bad_samples_stops_the_run_after_a_hundred(tmp_path: Path) -> None:
    account = BadSamples(tmp_path / "dropped.jsonl", 0.01)
    account.take(batch_of(90, Drop("a.json", 4, "", "image cannot be read: x"), Drop("a.json", 5, "", "y")))
    with pytest.raises(DataError, match=r"2 of 100 samples .* at most 1\.0% is allowed .* the last: a\.json record 5"):
        account.take(batch_of(10))


def test_the_counts_of_a_checkpoint_are_gone_on_from(tmp_path: Path) -> None:
    account = BadSamples(tmp_path / "dropped.jsonl", 0.01)
    account.take(batch_of(90, Drop("a.json", 4, "", "image cannot be read: x"), Drop("a.json", 5, "", "y")))
    account.save(tmp_path)
    resumed = BadSamples(tmp_path / "dropped.jsonl", 0.01)
    resumed.load(tmp_path)
    with pytest.raises(DataError, match=r"2 of 100 samples had an image that cannot be read"):
        resumed.take(batch_of(10))


def test_a_checkpoint_without_counts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bad_samples\.json: no counts of bad samples"):
        BadSamples(tmp_path / "dropped.jsonl", 0.01).load(tmp_path)


def told_by_two(rank: int, folder: Path) -> None:
    """Two samples are bad, and one rank finds both of them: each rank alone is within the limit or far beyond."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    account = BadSamples(folder / "dropped.jsonl", 0.02)
    bad = [Drop("a.json", n, "", "image cannot be read: x") for n in (4, 5, 4)[: 3 * rank]]
    account.take(batch_of(49, *bad))
    assert account.seen == 0 and not account.path.exists()  # a rank says nothing before all of them do
    account.share()
    account.take(batch_of(1))
    with pytest.raises(DataError) as caught:
        account.share()
    account.save(folder / str(rank))
    (folder / str(rank) / "error").write_text(str(caught.value), "utf-8")


def test_ranks_judge_together_and_one_of_them_writes_the_list(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    torch.multiprocessing.start_processes(told_by_two, (tmp_path,), nprocs=2, start_method="spawn")
    lines = (tmp_path / "dropped.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["record"] for line in lines] == [4, 5]
    assert "3 of 100 samples" in (tmp_path / "0" / "error").read_text("utf-8")
    for name in ("error", "bad_samples.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


class Cache:
    """Cached features of all pictures but one."""

    def read(self, images: Any) -> torch.Tensor:
        return torch.stack([torch.full((1, 2), float("cut" not in str(image.source))) for image in images])

    def check(self, images: Any) -> None:
        for image in images:
            if "cut" in str(image.source):
                raise DataError(f"{image.source}: is cut off")


@pytest.mark.parametrize("policy", ["drop", "replace"])
def test_a_picture_without_cached_features_is_bad_as_one_that_cannot_be_opened(folder: Folder, policy: Any) -> None:
    store = folder.store([qa("yes", "good.png"), qa("no", "cut.png"), qa("a", "other.png")])
    batch = Collator("flat", features=Cache(), on_bad_sample=policy, store=store, seed=5)([store[0], store[1]])
    first = int(store.lengths[0])
    lesson = bool((batch["labels"][0, first:] != IGNORE_INDEX).any())
    (drop,) = batch[BAD_SAMPLES]  # type: ignore[typeddict-item]
    assert (drop.record, drop.reason) == (2, f"image cannot be read: {folder.folder / 'cut.png'}: is cut off")
    action, features = {"drop": ("dropped", [1, 0]), "replace": ("replaced", [1, 1])}[policy]
    assert drop.action == action and batch["image_features"][:, 0, 0].tolist() == features
    assert lesson is (policy == "replace")
    with pytest.raises(DataError, match=r"a\.json record 2: image cannot be read: .*cut\.png"):
        Collator("flat", features=Cache(), on_bad_sample="error", store=store)([store[1]])


@pytest.mark.parametrize(("workers", "cached"), [(0, True), (1, False)])
def test_a_run_goes_on_past_a_broken_picture_and_lists_it(
    folder: Folder, tiny_llm_path: Path, tiny_clip_path: Path, workers: int, cached: bool
) -> None:
    """The real trainer; one step holds nothing but the broken one, and its loss is 0 and not 0 / 0."""
    from mmft.config import LLM, Model, Optim, Runtime, TrainConfig, Vision
    from mmft.train.run import train

    (folder.folder / "a.json").write_text(json.dumps([qa("yes", "good.png"), qa("no", "cut.png")]), "utf-8")
    source = use("json", path=str(folder.folder / "a.json"))
    cache = folder.folder / "features" if cached else None
    vision = Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("linear"), feature_cache=cache)
    config = TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path)), vision=vision),
        data=Data(
            datasets=(Dataset(source=source, data_map="llava", image_folder=folder.folder),),
            chat_template="chatml", max_length=256, num_workers=workers, max_bad_fraction=0.5,
        ),
        optim=Optim(lr=1e-3, max_steps=2),
        runtime=Runtime(output_dir=folder.folder / "run", device="cpu", precision="fp32", logging_steps=1),
    )  # fmt: skip
    assert train(config, folder.plugins) == 0
    lines = (folder.folder / "run" / "dropped.jsonl").read_text("utf-8").splitlines()
    assert [(json.loads(line)["record"], json.loads(line)["action"]) for line in lines] == [(2, "dropped")]
    metrics = [json.loads(line) for line in (folder.folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 2 and 0.0 in losses and max(losses) > 0


def test_a_resumed_run_keeps_the_pictures_it_found_broken_and_lists_none_twice(
    folder: Folder, tiny_llm_path: Path, tiny_clip_path: Path
) -> None:
    from mmft.config import LLM, Model, Optim, Runtime, TrainConfig, Vision
    from mmft.config.load import override
    from mmft.train.run import train

    (folder.folder / "a.json").write_text(json.dumps([qa("yes", "good.png"), qa("no", "cut.png")]), "utf-8")
    vision = Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("linear"))
    source = use("json", path=str(folder.folder / "a.json"))
    run = folder.folder / "run"
    config = TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path)), vision=vision),
        data=Data(
            datasets=(Dataset(source=source, data_map="llava", image_folder=folder.folder),),
            chat_template="chatml", max_length=256, max_bad_fraction=0.6,
        ),
        optim=Optim(lr=1e-3, epochs=2),
        runtime=Runtime(output_dir=run, device="cpu", precision="fp32", save_steps=2, save_total_limit=3),
    )  # fmt: skip
    assert train(config, folder.plugins) == 0
    listed = (run / "dropped.jsonl").read_text("utf-8")
    counts = (run / "checkpoint-4" / "bad_samples.json").read_text("utf-8")
    assert len(listed.splitlines()) == 1 and "cut.png" in listed and json.loads(counts) == {"seen": 4, "bad": 2}
    assert train(override(config, {}), folder.plugins, resume=run / "checkpoint-2") == 0  # the second epoch, again
    assert (run / "dropped.jsonl").read_text("utf-8") == listed
    assert (run / "checkpoint-4" / "bad_samples.json").read_text("utf-8") == counts
    assert train(config, folder.plugins, resume=run / "checkpoint-4") == 0  # nothing is left to train
    assert (run / "dropped.jsonl").read_text("utf-8") == listed

"""What a stream drops is counted and listed once; what it cannot do is said before or at once."""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from streams import WINDOW, account, data, listed, numbers, opened, texts

from mmft.config import LLM, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.config.check_streaming import streaming_problems
from mmft.data.collate import BAD_SAMPLES
from mmft.data.feed import KEY, Account, StreamFeed, read_state
from mmft.data.store import Drop
from mmft.data.stream import News, Position
from mmft.errors import DataError


@pytest.mark.parametrize("stop", range(1, 25))
def test_a_bad_record_is_listed_once_wherever_the_run_is_killed_and_resumed(counting, llm_tokenizer, tmp_path, stop):
    """Killed three rows after its checkpoint: what those rows told is told again, and listed once."""
    config = data(numbers(20, bad=[0, 3, 4, 19]))
    feed = StreamFeed(opened(config, counting[0], llm_tokenizer), account(tmp_path))
    for k, item in enumerate(islice(feed.stream, stop + 3), start=1):
        feed.take({KEY: (item.position, item.news)})
        if k == stop:
            feed.save(tmp_path)
    position, told = read_state(tmp_path)
    resumed = StreamFeed(opened(config, counting[0], llm_tokenizer, position), account(tmp_path, **told))
    for item in islice(resumed.stream, 40 - stop):
        resumed.take({KEY: (item.position, item.news)})
    assert listed(tmp_path) == [1, 4, 5, 20]
    straight = StreamFeed(opened(config, counting[0], llm_tokenizer), account(tmp_path))
    for item in islice(straight.stream, 40):
        straight.take({KEY: (item.position, item.news)})
    assert resumed.account.listed == 4
    assert (resumed.account.records, resumed.account.dropped) == (straight.account.records, straight.account.dropped)


def test_an_unreadable_picture_is_listed_once_over_a_resume(counting, llm_tokenizer, tmp_path):
    config = data(numbers(20, bad=[0]))
    feed = StreamFeed(opened(config, counting[0], llm_tokenizer), account(tmp_path))
    broken = Drop("counting", 3, "", "image cannot be read: a.png")
    for k, item in enumerate(islice(feed.stream, 8)):
        batch = {KEY: (item.position, item.news)} | ({BAD_SAMPLES: [broken]} if k % 4 == 2 else {})
        feed.take(batch)
        assert batch == {}
        if k == 4:
            feed.save(tmp_path)
    assert listed(tmp_path) == [1, 3]
    position, told = read_state(tmp_path)
    resumed = StreamFeed(opened(config, counting[0], llm_tokenizer, position), account(tmp_path, **told))
    resumed.take({KEY: (position, News()), BAD_SAMPLES: [broken]})
    assert listed(tmp_path) == [1, 3]
    assert resumed.account.dropped == 3


def shared_by_two(rank: int, folder: Path) -> None:
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = Account(folder / "dropped.jsonl", 0.15, lambda _: None)
    if rank == 0:
        told.begin()
    feed = StreamFeed(SimpleNamespace(start=Position(0, 0, ((0, 0),))), told)  # type: ignore[arg-type]
    for k in range(10):  # the same news for both ranks, a picture of its own for each
        broken = [Drop("a.jsonl", 10 * k + rank, "", "image cannot be read: a.png")] if k % 5 == 4 else []
        feed.take({KEY: (Position(0, k, ((0, 0),)), News(1)), BAD_SAMPLES: broken})
    with pytest.raises(DataError) as caught:
        feed.share()
    feed.save(folder / str(rank))
    (folder / str(rank) / "error").write_text(str(caught.value), "utf-8")


def test_pictures_that_ranks_could_not_read_are_one_account(tmp_path):
    import torch

    for rank in "01":
        (tmp_path / rank).mkdir()
    torch.multiprocessing.start_processes(shared_by_two, (tmp_path,), nprocs=2, start_method="spawn")
    assert listed(tmp_path) == [40, 90, 41, 91]
    assert "dropped 4 of the 10 records read" in (tmp_path / "0" / "error").read_text("utf-8")
    for name in ("error", "stream.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_a_fresh_run_begins_an_empty_list(tmp_path):
    (tmp_path / "dropped.jsonl").write_text("of an earlier run\n")
    account(tmp_path)
    assert listed(tmp_path) == []


def test_too_many_bad_records_stop_the_run_with_the_first_of_them(tmp_path):
    counted = account(tmp_path, 0.01)
    counted.take(News(1000, tuple(Drop("a.jsonl", i, "", "no answer") for i in range(1, 11))))
    with pytest.raises(DataError, match=r"dropped 21 of the 2,000 .* 1\.0% .*a\.jsonl record 1: no answer"):
        counted.take(News(1000, tuple(Drop("a.jsonl", i, "", "no answer") for i in range(1001, 1012))))


def test_what_is_trained_in_part_is_listed_and_does_not_count_as_dropped(counting, llm_tokenizer, tmp_path):
    config = data(numbers(20), too_long="truncate", max_length=30)
    counted = account(tmp_path, 0.0)
    items = list(islice(opened(config, counting[0], llm_tokenizer), 60))
    for item in items:
        counted.take(item.news)
    assert not any(item.news.drops for item in items[20:])  # told in the first pass only: the list must not grow
    assert counted.dropped == 0
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert {line["action"] for line in lines} == {"truncated"}
    assert len({line["record"] for line in lines}) == len(lines) > 0


def test_a_stream_of_bad_records_ends_instead_of_reading_for_ever(counting, llm_tokenizer):
    config = data(numbers(200_000, bad=range(200_000)))
    with pytest.raises(DataError, match="dropped 7 of the 7"):
        next(iter(opened(config, counting[0], llm_tokenizer)))
    assert len(counting[1].READ) <= WINDOW + 1


def test_a_stream_that_may_drop_everything_still_ends(counting, llm_tokenizer):
    config = data(numbers(10, bad=range(10)), max_bad_fraction=1.0)
    with pytest.raises(DataError, match="dropped"):
        next(iter(opened(config, counting[0], llm_tokenizer)))


def test_a_bad_record_is_an_error_where_the_config_says_so(counting, llm_tokenizer):
    config = data(numbers(20, bad=[4]), on_bad_sample="error")
    with pytest.raises(DataError, match=r"counting record 5 \(id \"4\"\).*on_bad_sample is 'error'"):
        next(iter(opened(config, counting[0], llm_tokenizer)))


def test_a_sample_knows_its_record(counting, llm_tokenizer):
    """So that an image that turns out to be broken is named by it."""
    for item in islice(opened(data(numbers(20)), counting[0], llm_tokenizer), 20):
        assert texts([item], llm_tokenizer) == [f"n{item.sample.record - 1}"]


def test_a_dataset_without_records_is_named(counting, llm_tokenizer):
    with pytest.raises(DataError, match="counting gives no records"):
        list(islice(opened(data(numbers(10), numbers(0)), counting[0], llm_tokenizer), 30))


def test_data_that_shrank_since_the_checkpoint_is_noticed(counting, llm_tokenizer):
    position = next(islice(opened(data(numbers(13)), counting[0], llm_tokenizer), 11, None)).position
    with pytest.raises(DataError, match="not what it was at the checkpoint"):
        next(iter(opened(data(numbers(8)), counting[0], llm_tokenizer, position)))


def problems(folder: Path, **parts) -> list[str]:
    model = Model(llm=LLM(path="m", lora=Lora()), vision=parts.pop("vision", None))
    optim = Optim(lr=1e-4, **{"max_steps": 10} | parts.pop("optim", {}))
    datasets = parts.pop("datasets", [{}])
    sources = tuple(Dataset(source=use("counting"), data_map="alpaca", **options) for options in datasets)
    config = TrainConfig(model=model, data=data(*sources, **parts), optim=optim, runtime=Runtime(output_dir=folder))
    return [str(problem) for problem in streaming_problems(config)]


def test_a_config_that_can_stream_has_no_problem(tmp_path):
    assert problems(tmp_path, packing=True, datasets=[{"repeat": 2}, {}]) == []
    assert problems(tmp_path, streaming=False, optim={"max_steps": None, "epochs": 3}) == []


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        ({"optim": {"max_steps": None}}, "optim.max_steps"),
        ({"optim": {"epochs": 3}}, "optim.epochs"),
        ({"group_by_length": True}, "data.group_by_length"),
        ({"on_bad_sample": "replace"}, "data.on_bad_sample"),
        ({"group_by_modality": True}, "data.group_by_modality"),
        ({"datasets": [{}, {"repeat": 1.5}]}, "data.datasets.1.repeat"),
        ({"datasets": [{"weight": 1, "repeat": 2}]}, "data.datasets.0.repeat"),
        (
            {"vision": Vision(encoder=use("clip"), projector=use("mlp2x_gelu"), feature_cache=Path("f"))},
            "model.vision.feature_cache",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_said_before_it_starts(tmp_path, parts, where):
    (found,) = problems(tmp_path, **parts)
    assert where in found

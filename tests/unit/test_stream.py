"""A stream of records: its order is a pure function of the seed, and every position of it can be gone back to."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.config.check_streaming import streaming_problems
from mmft.data.collate import BAD_SAMPLES, Collator
from mmft.data.feed import KEY, STATE, Account, StreamFeed, read_state
from mmft.data.store import Drop
from mmft.data.stream import News, Position, SampleStream, StreamItem
from mmft.data.tokenize import Tokenizer
from mmft.errors import CheckpointError, DataError
from mmft.plugins import load_plugins
from mmft.types import PackedSample

WINDOW = 7
COUNTING = """
from mmft import DatasetSpec, hookimpl

READ = []
STARTS = []

def load(number, bad=()):
    return load_from(0, number=number, bad=bad)

def load_from(start, number, bad=()):
    STARTS.append(start)
    for i in range(start, number):
        READ.append(i)
        yield {"id": i} if i in bad else {"id": i, "instruction": f"say {i}", "output": f"n{i} " * (1 + i % 5)}

@hookimpl
def mmft_datasets():
    return [DatasetSpec(name="counting", load=load, load_from=load_from)]
"""


@pytest.fixture
def counting(install):
    """A source that says what was read of it, and where it was opened."""
    install("counting-mmft", "1", {"counting": "counting_mod"}, counting_mod=COUNTING)
    plugins = load_plugins()
    import counting_mod

    counting_mod.READ.clear()
    counting_mod.STARTS.clear()
    return plugins, counting_mod


@pytest.fixture(scope="session")
def tokenizer(tiny_llm_path) -> Tokenizer:
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))


def numbers(number: int, **options) -> Dataset:
    source = {name: options.pop(name) for name in ("bad",) if name in options}
    return Dataset(source=use("counting", number=number, **source), data_map="alpaca", **options)


def data(*datasets: Dataset, **options) -> Data:
    options = {"chat_template": "chatml", "max_length": 96, "streaming": True, "max_bad_fraction": 0.5} | options
    return Data(datasets=datasets, **options)


def opened(config: Data, plugins, tokenizer, start: Position | None = None, *, seed: int = 3) -> SampleStream:
    return SampleStream(config, plugins, tokenizer, seed=seed, start=start, window=WINDOW)


def plain(item: StreamItem) -> tuple:
    """What an item says, comparable."""
    samples = item.sample.samples if isinstance(item.sample, PackedSample) else (item.sample,)
    return [s.input_ids.tolist() for s in samples], item.position, item.news


def texts(items: list[StreamItem], tokenizer: Tokenizer) -> list[str]:
    """What the assistant says in each sample, which tells the record."""
    rows = [i.sample.samples if isinstance(i.sample, PackedSample) else (i.sample,) for i in items]
    return [tokenizer.hf.decode(s.input_ids[s.loss_mask]).split()[0] for row in rows for s in row]


MIXES = {
    "one": [{"number": 20}],
    "several": [{"number": 20}, {"number": 5, "repeat": 2}, {"number": 9}],
    "weighted": [{"number": 20, "weight": 1}, {"number": 4, "weight": 3}],
    "bad": [{"number": 20, "bad": [0, 3, 4, 5, 6, 19]}, {"number": 5}],
    "a whole window bad": [{"number": 40, "bad": list(range(14, 28))}],
}


def mix(name: str) -> list[Dataset]:
    return [numbers(**options) for options in MIXES[name]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_from_every_position_the_stream_goes_on_as_if_it_had_never_stopped(counting, tokenizer, name, packing):
    config = data(*mix(name), packing=packing, max_bad_fraction=1.0)
    straight = [plain(item) for item in islice(opened(config, counting[0], tokenizer), 60)]
    assert len({position for _, position, _ in straight}) == 60
    for k, (_, position, _) in enumerate(straight[:-1], start=1):
        resumed = islice(opened(config, counting[0], tokenizer, position), 60 - k)
        assert [plain(item) for item in resumed] == straight[k:]


def test_a_position_survives_json(counting, tokenizer, tmp_path):
    item = next(islice(opened(data(*mix("several")), counting[0], tokenizer), 11, None))
    feed = StreamFeed(opened(data(*mix("several")), counting[0], tokenizer), account(tmp_path))
    feed.take({KEY: (item.position, News(7))})
    feed.save(tmp_path)
    assert read_state(tmp_path) == (item.position, {"records": 7, "dropped": 0, "listed": 0})


def test_a_checkpoint_without_a_position_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=STATE):
        read_state(tmp_path)


def test_the_order_is_a_pure_function_of_the_seed(counting, tokenizer):
    config = data(*mix("several"), packing=True)
    first, same, other = (
        [plain(item) for item in islice(opened(config, counting[0], tokenizer, seed=seed), 40)] for seed in (3, 3, 4)
    )
    assert first == same
    assert first != other


def test_each_window_is_in_another_order(counting, tokenizer):
    said = texts(list(islice(opened(data(numbers(WINDOW)), counting[0], tokenizer), 6 * WINDOW)), tokenizer)
    passes = [tuple(said[start : start + WINDOW]) for start in range(0, len(said), WINDOW)]
    assert {tuple(sorted(one)) for one in passes} == {tuple(f"n{i}" for i in range(WINDOW))}
    assert len(set(passes)) > 3


@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_reads_every_record_as_often_as_its_dataset_repeats(counting, tokenizer, packing):
    config = data(numbers(20), numbers(5, repeat=2), packing=packing)
    stream = opened(config, counting[0], tokenizer)
    first_pass = []
    for item in stream:
        first_pass.append(item)
        if item.position.cursors in {((0, 20), (1, 5)), ((1, 0), (1, 5)), ((0, 20), (2, 0)), ((1, 0), (2, 0))}:
            break
    seen = Counter(texts(first_pass, tokenizer))
    assert seen == {f"n{i}": 3 if i < 5 else 1 for i in range(20)}


def test_datasets_are_mixed_from_the_first_window_on(counting, tokenizer):
    config = data(numbers(1000), numbers(1000, limit=700))
    cursors = next(iter(SampleStream(config, counting[0], tokenizer, seed=1, window=200))).position.cursors
    after = next(islice(SampleStream(config, counting[0], tokenizer, seed=1, window=200), 199, None)).position.cursors
    assert cursors == ((0, 0), (0, 0))
    assert all(70 < record < 130 for _, record in after)


def test_weights_decide_how_often_a_dataset_is_read(counting, tokenizer):
    config = data(numbers(1000, weight=1), numbers(10, weight=3))
    items = islice(SampleStream(config, counting[0], tokenizer, seed=1, window=400), 400)
    (_, large), (turns, small) = list(items)[-1].position.cursors
    assert large + turns * 10 + small == 400
    assert 70 < large < 130


def test_the_first_row_comes_before_the_source_is_read_to_its_end(counting, tokenizer):
    plugins, source = counting
    next(iter(SampleStream(data(numbers(200_000)), plugins, tokenizer, seed=0)))
    assert len(source.READ) <= 1001


def test_resuming_opens_the_source_at_the_window_and_nowhere_before(counting, tokenizer):
    plugins, source = counting
    config = data(numbers(200_000))
    position = next(islice(opened(config, plugins, tokenizer), 7 * 30 + 3, None)).position
    source.READ.clear()
    source.STARTS.clear()
    next(iter(opened(config, plugins, tokenizer, position)))
    assert source.STARTS == [7 * 30]
    assert source.READ[0] == 7 * 30
    assert len(source.READ) <= WINDOW + 1


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_and_stand_at_the_same_position(counting, tokenizer, world):
    config = data(*mix("several"))
    straight = [plain(item) for item in islice(opened(config, counting[0], tokenizer), 30)]
    stream = opened(config, counting[0], tokenizer)
    ranks = [list(islice(stream.shared(batch_size=2, rank=r, world=world), 30 // world)) for r in range(world)]
    dealt = [plain(item)[0] for group in zip(*ranks, strict=True) for item in group]
    assert dealt == [ids for ids, _, _ in straight]
    for group in zip(*ranks, strict=True):
        assert len({item.position for item in group}) == 1
    assert sum((item.news for item in ranks[0]), News()) == sum((news for _, _, news in straight), News())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_batches_of_one_process(counting, tokenizer, tmp_path, workers):
    batches = []
    for number in (0, workers):
        config = data(*mix("bad"), num_workers=number)
        feed = StreamFeed(opened(config, counting[0], tokenizer), account(tmp_path))
        loader = feed.loader(Collator("flat"), batch_size=2, rank=0, world=1, pin_memory=False)
        batches.append([(b["input_ids"].tolist(), b[KEY]) for b in islice(loader, 12)])
    assert batches[0] == batches[1]


def test_starting_a_loader_leaves_the_random_state_alone(counting, tokenizer, tmp_path):
    """Else the dropout of a resumed run would not be that of the run it continues."""
    import torch

    feed = StreamFeed(opened(data(numbers(20)), counting[0], tokenizer), account(tmp_path))
    before = torch.get_rng_state()
    next(iter(feed.loader(Collator("flat"), batch_size=1, rank=0, world=1, pin_memory=False)))
    assert torch.equal(before, torch.get_rng_state())


def account(folder: Path, allowed: float = 1.0, **told: int) -> Account:
    begun = Account(folder / "dropped.jsonl", allowed, lambda _: None, **told)
    begun.begin()
    return begun


def listed(folder: Path) -> list[int]:
    return [json.loads(line)["record"] for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("stop", range(1, 25))
def test_a_bad_record_is_listed_once_wherever_the_run_is_killed_and_resumed(counting, tokenizer, tmp_path, stop):
    """Killed three rows after its checkpoint: what those rows told is told again, and listed once."""
    config = data(numbers(20, bad=[0, 3, 4, 19]))
    feed = StreamFeed(opened(config, counting[0], tokenizer), account(tmp_path))
    for k, item in enumerate(islice(feed.stream, stop + 3), start=1):
        feed.take({KEY: (item.position, item.news)})
        if k == stop:
            feed.save(tmp_path)
    position, told = read_state(tmp_path)
    resumed = StreamFeed(opened(config, counting[0], tokenizer, position), account(tmp_path, **told))
    for item in islice(resumed.stream, 40 - stop):
        resumed.take({KEY: (item.position, item.news)})
    assert listed(tmp_path) == [1, 4, 5, 20]
    straight = StreamFeed(opened(config, counting[0], tokenizer), account(tmp_path))
    for item in islice(straight.stream, 40):
        straight.take({KEY: (item.position, item.news)})
    assert resumed.account.listed == 4
    assert (resumed.account.records, resumed.account.dropped) == (straight.account.records, straight.account.dropped)


def test_an_unreadable_picture_is_listed_once_over_a_resume(counting, tokenizer, tmp_path):
    config = data(numbers(20, bad=[0]))
    feed = StreamFeed(opened(config, counting[0], tokenizer), account(tmp_path))
    broken = Drop("counting", 3, "", "image cannot be read: a.png")
    for k, item in enumerate(islice(feed.stream, 8)):
        batch = {KEY: (item.position, item.news)} | ({BAD_SAMPLES: [broken]} if k % 4 == 2 else {})
        feed.take(batch)
        assert batch == {}
        if k == 4:
            feed.save(tmp_path)
    assert listed(tmp_path) == [1, 3]
    position, told = read_state(tmp_path)
    resumed = StreamFeed(opened(config, counting[0], tokenizer, position), account(tmp_path, **told))
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
    torch.multiprocessing.start_processes(shared_by_two, (tmp_path,), nprocs=2, start_method="fork")
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


def test_what_is_trained_in_part_is_listed_and_does_not_count_as_dropped(counting, tokenizer, tmp_path):
    config = data(numbers(20), too_long="truncate", max_length=30)
    counted = account(tmp_path, 0.0)
    items = list(islice(opened(config, counting[0], tokenizer), 60))
    for item in items:
        counted.take(item.news)
    assert not any(item.news.drops for item in items[20:])  # told in the first pass only: the list must not grow
    assert counted.dropped == 0
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert {line["action"] for line in lines} == {"truncated"}
    assert len({line["record"] for line in lines}) == len(lines) > 0


def test_a_stream_of_bad_records_ends_instead_of_reading_for_ever(counting, tokenizer):
    config = data(numbers(200_000, bad=range(200_000)))
    with pytest.raises(DataError, match="dropped 7 of the 7"):
        next(iter(opened(config, counting[0], tokenizer)))
    assert len(counting[1].READ) <= WINDOW + 1


def test_a_stream_that_may_drop_everything_still_ends(counting, tokenizer):
    config = data(numbers(10, bad=range(10)), max_bad_fraction=1.0)
    with pytest.raises(DataError, match="dropped"):
        next(iter(opened(config, counting[0], tokenizer)))


def test_a_bad_record_is_an_error_where_the_config_says_so(counting, tokenizer):
    config = data(numbers(20, bad=[4]), on_bad_sample="error")
    with pytest.raises(DataError, match=r"counting record 5 \(id \"4\"\).*on_bad_sample is 'error'"):
        next(iter(opened(config, counting[0], tokenizer)))


def test_a_sample_knows_its_record(counting, tokenizer):
    """So that an image that turns out to be broken is named by it."""
    for item in islice(opened(data(numbers(20)), counting[0], tokenizer), 20):
        assert texts([item], tokenizer) == [f"n{item.sample.record - 1}"]


def test_a_dataset_without_records_is_named(counting, tokenizer):
    with pytest.raises(DataError, match="counting gives no records"):
        list(islice(opened(data(numbers(10), numbers(0)), counting[0], tokenizer), 30))


def test_data_that_shrank_since_the_checkpoint_is_noticed(counting, tokenizer):
    position = next(islice(opened(data(numbers(13)), counting[0], tokenizer), 11, None)).position
    with pytest.raises(DataError, match="not what it was at the checkpoint"):
        next(iter(opened(data(numbers(8)), counting[0], tokenizer, position)))


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

"""A stream of records: its order is a pure function of the seed, and every position of it can be gone back to."""

from collections import Counter
from itertools import islice

import pytest
from streams import MIXES, WINDOW, account, data, mix, numbers, opened, plain, texts

from mmft.data.collate import Collator
from mmft.data.feed import KEY, STATE, StreamFeed, read_state
from mmft.data.stream import News, SampleStream
from mmft.errors import CheckpointError


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_from_every_position_the_stream_goes_on_as_if_it_had_never_stopped(counting, llm_tokenizer, name, packing):
    config = data(*mix(name), packing=packing, max_bad_fraction=1.0)
    straight = [plain(item) for item in islice(opened(config, counting[0], llm_tokenizer), 60)]
    assert len({position for _, position, _ in straight}) == 60
    for k, (_, position, _) in enumerate(straight[:-1], start=1):
        resumed = islice(opened(config, counting[0], llm_tokenizer, position), 60 - k)
        assert [plain(item) for item in resumed] == straight[k:]


def test_a_position_survives_json(counting, llm_tokenizer, tmp_path):
    item = next(islice(opened(data(*mix("several")), counting[0], llm_tokenizer), 11, None))
    feed = StreamFeed(opened(data(*mix("several")), counting[0], llm_tokenizer), account(tmp_path))
    feed.take({KEY: (item.position, News(7))})
    feed.save(tmp_path)
    assert read_state(tmp_path) == (item.position, {"records": 7, "dropped": 0, "listed": 0})


def test_a_checkpoint_without_a_position_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=STATE):
        read_state(tmp_path)


def test_the_order_is_a_pure_function_of_the_seed(counting, llm_tokenizer):
    config = data(*mix("several"), packing=True)
    first, same, other = (
        [plain(item) for item in islice(opened(config, counting[0], llm_tokenizer, seed=seed), 40)]
        for seed in (3, 3, 4)
    )
    assert first == same
    assert first != other


def test_each_window_is_in_another_order(counting, llm_tokenizer):
    said = texts(list(islice(opened(data(numbers(WINDOW)), counting[0], llm_tokenizer), 6 * WINDOW)), llm_tokenizer)
    passes = [tuple(said[start : start + WINDOW]) for start in range(0, len(said), WINDOW)]
    assert {tuple(sorted(one)) for one in passes} == {tuple(f"n{i}" for i in range(WINDOW))}
    assert len(set(passes)) > 3


@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_reads_every_record_as_often_as_its_dataset_repeats(counting, llm_tokenizer, packing):
    config = data(numbers(20), numbers(5, repeat=2), packing=packing)
    stream = opened(config, counting[0], llm_tokenizer)
    first_pass = []
    for item in stream:
        first_pass.append(item)
        if item.position.cursors in {((0, 20), (1, 5)), ((1, 0), (1, 5)), ((0, 20), (2, 0)), ((1, 0), (2, 0))}:
            break
    seen = Counter(texts(first_pass, llm_tokenizer))
    assert seen == {f"n{i}": 3 if i < 5 else 1 for i in range(20)}


def test_datasets_are_mixed_from_the_first_window_on(counting, llm_tokenizer):
    config = data(numbers(1000), numbers(1000, limit=700))
    cursors = next(iter(SampleStream(config, counting[0], llm_tokenizer, seed=1, window=200))).position.cursors
    after = next(
        islice(SampleStream(config, counting[0], llm_tokenizer, seed=1, window=200), 199, None)
    ).position.cursors
    assert cursors == ((0, 0), (0, 0))
    assert all(70 < record < 130 for _, record in after)


def test_weights_decide_how_often_a_dataset_is_read(counting, llm_tokenizer):
    config = data(numbers(1000, weight=1), numbers(10, weight=3))
    items = islice(SampleStream(config, counting[0], llm_tokenizer, seed=1, window=400), 400)
    (_, large), (turns, small) = list(items)[-1].position.cursors
    assert large + turns * 10 + small == 400
    assert 70 < large < 130


def test_the_first_row_comes_before_the_source_is_read_to_its_end(counting, llm_tokenizer):
    plugins, source = counting
    next(iter(SampleStream(data(numbers(200_000)), plugins, llm_tokenizer, seed=0)))
    assert len(source.READ) <= 1001


def test_resuming_opens_the_source_at_the_window_and_nowhere_before(counting, llm_tokenizer):
    plugins, source = counting
    config = data(numbers(200_000))
    position = next(islice(opened(config, plugins, llm_tokenizer), 7 * 30 + 3, None)).position
    source.READ.clear()
    source.STARTS.clear()
    next(iter(opened(config, plugins, llm_tokenizer, position)))
    assert source.STARTS == [7 * 30]
    assert source.READ[0] == 7 * 30
    assert len(source.READ) <= WINDOW + 1


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_and_stand_at_the_same_position(counting, llm_tokenizer, world):
    config = data(*mix("several"))
    straight = [plain(item) for item in islice(opened(config, counting[0], llm_tokenizer), 30)]
    stream = opened(config, counting[0], llm_tokenizer)
    ranks = [list(islice(stream.shared(batch_size=2, rank=r, world=world), 30 // world)) for r in range(world)]
    dealt = [plain(item)[0] for group in zip(*ranks, strict=True) for item in group]
    assert dealt == [ids for ids, _, _ in straight]
    for group in zip(*ranks, strict=True):
        assert len({item.position for item in group}) == 1
    assert sum((item.news for item in ranks[0]), News()) == sum((news for _, _, news in straight), News())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_batches_of_one_process(counting, llm_tokenizer, tmp_path, workers):
    batches = []
    for number in (0, workers):
        config = data(*mix("bad"), num_workers=number)
        feed = StreamFeed(opened(config, counting[0], llm_tokenizer), account(tmp_path))
        loader = feed.loader(Collator("flat"), batch_size=2, rank=0, world=1, pin_memory=False)
        batches.append([(b["input_ids"].tolist(), b[KEY]) for b in islice(loader, 12)])
    assert batches[0] == batches[1]


def test_starting_a_loader_leaves_the_random_state_alone(counting, llm_tokenizer, tmp_path):
    """Else the dropout of a resumed run would not be that of the run it continues."""
    import torch

    feed = StreamFeed(opened(data(numbers(20)), counting[0], llm_tokenizer), account(tmp_path))
    before = torch.get_rng_state()
    next(iter(feed.loader(Collator("flat"), batch_size=1, rank=0, world=1, pin_memory=False)))
    assert torch.equal(before, torch.get_rng_state())

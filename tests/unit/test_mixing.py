"""Shares of datasets: an epoch's part is a function of (seed, epoch), and nothing comes twice before all came once."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, use
from mmft.config.check import find_problems
from mmft.data.dataset import prepare
from mmft.data.mixing import Mixing
from mmft.data.pack import PackedStore
from mmft.data.sampler import StepSampler
from mmft.data.store import TokenStore
from mmft.data.tokenize import Tokenizer
from mmft.plugins import Plugins


def datasets(*options: dict[str, float]) -> list[Dataset]:
    return [Dataset(source=use("json", path=f"{i}.json"), data_map="alpaca", **o) for i, o in enumerate(options)]


def mixing_of(*sized: tuple[int, dict[str, float]]) -> Mixing:
    mixing = Mixing.of(datasets(*(options for _, options in sized)), [size for size, _ in sized])
    assert mixing is not None
    return mixing


def test_whole_repeats_without_weights_need_no_mixing() -> None:
    assert Mixing.of(datasets({"repeat": 2}, {}), [5, 3]) is None


def test_a_fraction_takes_another_part_each_epoch_until_everything_came_once() -> None:
    mixing = mixing_of((100, {"repeat": 0.25}), (7, {}))
    parts = [mixing.draw(3, epoch) for epoch in range(4)]
    assert [len(part) for part in parts] == [32] * 4
    first = np.concatenate([part[part < 100] for part in parts])
    assert sorted(first.tolist()) == list(range(100))
    assert all(sorted(part[part >= 100].tolist()) == list(range(100, 107)) for part in parts)


def test_a_repeat_of_two_and_a_half_takes_each_sample_two_or_three_times() -> None:
    counts = Counter(mixing_of((10, {"repeat": 2.5})).draw(0, 0).tolist())
    assert sum(counts.values()) == 25 and set(counts.values()) == {2, 3}


def test_weights_share_out_an_epoch_of_as_many_samples_as_there_are() -> None:
    mixing = mixing_of((90, {"weight": 1}), (10, {"weight": 3}))
    assert mixing.quotas == (25, 75)
    counts = Counter(one for one in mixing.draw(0, 0).tolist() if one >= 90)
    assert set(counts.values()) == {7, 8} and len(counts) == 10  # 75 of 10: each again only after all others


def test_an_empty_dataset_has_no_share() -> None:
    assert mixing_of((8, {"weight": 1}), (0, {"weight": 1})).quotas == (8, 0)


@given(
    sized=st.lists(st.tuples(st.integers(0, 20), st.floats(0.05, 4)), min_size=1, max_size=4),
    seed=st.integers(0, 5), epoch=st.integers(0, 5),
)  # fmt: skip
def test_the_draw_is_a_function_of_seed_and_epoch_and_stays_within_each_dataset(
    sized: list[tuple[int, float]], seed: int, epoch: int
) -> None:
    mixing = mixing_of(*((size, {"weight": weight}) for size, weight in sized))
    drawn = mixing.draw(seed, epoch)
    assert drawn.tolist() == mixing.draw(seed, epoch).tolist() and len(drawn) == sum(mixing.quotas)
    bounds = np.cumsum([0, *mixing.sizes])
    counted = [int(((drawn >= bounds[i]) & (drawn < bounds[i + 1])).sum()) for i in range(len(sized))]
    assert counted == list(mixing.quotas)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_sampler_orders_what_the_mixing_draws(grouped: bool) -> None:
    mixing = mixing_of((40, {"repeat": 0.5}), (10, {"repeat": 1.5}))
    lengths, images = np.arange(1, 51), np.arange(50) % 3 == 0
    sampler = StepSampler(lengths, images, 4, seed=1, by_modality=grouped, by_length=grouped, mixing=mixing)
    assert len(sampler) == 35
    for epoch in (0, 1):
        assert sorted(sampler.order(epoch).tolist()) == sorted(mixing.draw(1, epoch).tolist())
    assert sampler.order(0).tolist() != sampler.order(1).tolist()


@pytest.fixture
def store(tmp_path: Path, plugins: Plugins, tiny_llm_path: Path) -> TokenStore:
    made = []
    for name, number, repeat in (("a", 30, 0.5), ("b", 6, 2.0)):
        path = tmp_path / f"{name}.json"
        records = [{"instruction": "Say", "input": "", "output": f"{name} {i}"} for i in range(number)]
        path.write_text(json.dumps(records), "utf-8")
        made.append(Dataset(source=use("json", path=str(path)), data_map="alpaca", repeat=repeat))
    data = Data(datasets=tuple(made), chat_template="chatml", max_length=100)
    tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))
    return prepare(data, plugins, tokenizer, tmp_path / "cache")


def test_a_store_with_shares_holds_each_sample_once_and_says_what_an_epoch_takes(store: TokenStore) -> None:
    assert len(store) == 36 and store.mixing is not None and store.mixing.quotas == (15, 12)
    assert "an epoch takes 15 of 30 from" in store.summary()


def test_packed_rows_are_of_one_dataset_and_rows_are_drawn(store: TokenStore) -> None:
    packed = PackedStore.of(store, 100)
    assert packed.mixing is not None and sum(packed.mixing.sizes) == len(packed)
    assert packed.mixing.quotas == (round(packed.mixing.sizes[0] / 2), 2 * packed.mixing.sizes[1])
    sources = [{sample.source for sample in packed[row].samples} for row in range(len(packed))]  # type: ignore[attr-defined]
    assert all(len(one) == 1 for one in sources)
    assert sorted(packed.items.tolist()) == list(range(36))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ([{"weight": 1.0}, {}], "data.datasets"),
        ([{"weight": 1.0, "repeat": 2.0}, {"weight": 1.0}], "data.datasets.0.repeat"),
        ([{"system_text": "nowhere"}, {}], "data.datasets.0.system_text"),
        ([{}, {"weight": 2.0}], "data.datasets"),
    ],
)
def test_a_config_whose_shares_contradict_each_other_is_refused(
    tmp_path: Path, tiny_llm_path: Path, plugins: Plugins, options: list[dict[str, float]], where: str
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.json").write_text("[]", "utf-8")
    made = [
        Dataset(source=use("json", path=str(tmp_path / f"{i}.json")), data_map="alpaca", **o)  # type: ignore[arg-type]
        for i, o in enumerate(options)
    ]
    config = TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path), trainable=True)),
        data=Data(datasets=tuple(made), chat_template="chatml", max_length=64),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=tmp_path / "run"),
    )
    assert [problem.where for problem in find_problems(config, plugins)] == [where]

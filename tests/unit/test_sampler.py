"""The order of the data: every item once, steps of one modality, a function of (seed, epoch) and of nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmft.data.sampler import StepSampler, describe_steps

Sizes = st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=120)
Step = st.integers(1, 9)


def sampler(
    items: list[tuple[int, bool]], step: int, *, seed: int = 0, by_modality: bool = True, by_length: bool = True
) -> StepSampler:
    lengths = np.array([length for length, _ in items], dtype=np.int64)
    images = np.array([image for _, image in items], dtype=np.bool_)
    return StepSampler(lengths, images, step, seed=seed, by_modality=by_modality, by_length=by_length)


def some_items(number: int = 103) -> list[tuple[int, bool]]:
    random = np.random.default_rng(0)
    return [(int(n), bool(i)) for n, i in zip(random.integers(1, 50, number), random.random(number) < 0.6, strict=True)]


def steps_of(order: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
    return [order[start : start + step] for start in range(0, len(order), step)]


@given(Sizes, Step, st.booleans(), st.booleans(), st.integers(0, 5))
def test_every_item_comes_exactly_once_in_each_epoch(
    items: list[tuple[int, bool]], step: int, by_modality: bool, by_length: bool, epoch: int
) -> None:
    order = sampler(items, step, by_modality=by_modality, by_length=by_length).order(epoch)
    assert sorted(order.tolist()) == list(range(len(items)))


@given(Sizes, Step)
def test_each_step_is_of_one_modality_but_those_made_of_what_is_left_over(
    items: list[tuple[int, bool]], step: int
) -> None:
    chosen = sampler(items, step)
    images = int(chosen.has_image.sum())
    mixed = [one for one in steps_of(chosen.order(0), step) if len(set(chosen.has_image[one].tolist())) == 2]
    assert sum(map(len, mixed)) <= images % step + (len(items) - images) % step


@given(Sizes, Step, st.booleans(), st.integers(0, 3))
@example([(1, True), (1, True), (50, True), (50, False)], 2, True, 5)  # two long ones are left over and share a step
def test_the_step_with_the_most_tokens_comes_first(
    items: list[tuple[int, bool]], step: int, by_modality: bool, epoch: int
) -> None:
    """So that a run that does not fit into memory ends at once."""
    chosen = sampler(items, step, by_modality=by_modality)
    totals = [int(chosen.lengths[one].sum()) for one in steps_of(chosen.order(epoch), step) if len(one) == step]
    assert totals == [] or totals[0] == max(totals)


@pytest.mark.parametrize("options", [{}, {"by_modality": False}, {"by_length": False}])
def test_the_order_is_a_function_of_seed_and_epoch_alone(options: dict[str, bool]) -> None:
    first = sampler(some_items(), 4, seed=7, **options)
    expected = first.order(3).tolist()
    np.random.seed(1)
    torch.manual_seed(1)
    list(first)
    other = sampler(some_items(), 4, seed=7, **options)
    other.set_epoch(1)
    list(other)
    other.set_epoch(3)
    assert list(other) == expected == first.order(3).tolist()


def test_another_seed_or_epoch_is_another_order() -> None:
    orders = [sampler(some_items(), 4, seed=seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for index, a in enumerate(orders) for b in orders[:index])


def test_a_step_holds_items_of_similar_length_when_grouped_by_length() -> None:
    items = some_items(2000)

    def spread(by_length: bool) -> float:
        chosen = sampler(items, 8, by_length=by_length)
        return float(np.mean([np.ptp(chosen.lengths[one]) for one in steps_of(chosen.order(0), 8)]))

    assert spread(True) < spread(False) / 5


def test_steps_are_shuffled_and_not_sorted_by_length() -> None:
    chosen = sampler(some_items(2000), 8, by_modality=False)
    totals = [int(chosen.lengths[one].sum()) for one in steps_of(chosen.order(0), 8)][1:]
    assert abs(np.corrcoef(totals, np.arange(len(totals)))[0, 1]) < 0.2


def test_iterating_gives_the_order_of_the_epoch_that_was_set() -> None:
    chosen = sampler(some_items(), 4)
    assert len(chosen) == 103 and list(chosen) == chosen.order(0).tolist()
    chosen.set_epoch(2)
    assert list(chosen) == chosen.order(2).tolist()


def test_padding_is_counted_in_the_order_of_the_run() -> None:
    items = [(length, False) for length in (1, 9) * 20]
    shares = []
    for grouped in (False, True):
        one = sampler(items, 4, by_modality=False, by_length=grouped)
        order = one.order(0)
        widths = [2 * max(one.lengths[order[i : i + 2]]) for i in range(0, 40, 2)]
        shares.append(1 - sum(length for length, _ in items) / sum(widths))
        text = f"; no padding, or {shares[-1]:.1%} of a batch where the model needs padded ones"
        assert describe_steps(one, 2).endswith(text)
        assert describe_steps(one, 2, padded=True).endswith(f"; {shares[-1]:.1%} of a batch is padding")
        assert describe_steps(one, 2, padded=False).endswith("; no padding")
    assert shares[1] < shares[0]


def test_a_last_step_that_is_not_whole_is_not_in_the_average() -> None:
    text = describe_steps(sampler([(10, False)] * 9, 4), 2, padded=False)
    assert text == "batches of 2 x 2: 40 tokens a step on average (from 40 to 40); no padding"

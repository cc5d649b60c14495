"""Samples longer than a row, cut in pieces: nothing is lost, nothing is trained twice, no image is cut."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmft.config import Data, Dataset, use
from mmft.data.collate import labels_of
from mmft.data.cut import split
from mmft.data.dataset import prepare
from mmft.data.tokenize import Tokenizer
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.types import IGNORE_INDEX, Image, TokenizedSample

PER_IMAGE = 4


@pytest.fixture(scope="session")
def seeing(tiny_llm_path: Path) -> Tokenizer:
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), PER_IMAGE)


def sample_of(kinds: str, tokenizer: Tokenizer) -> TokenizedSample:
    """`t` is a target, `c` context, `i` a whole image; text ids count up, so each is known again."""
    ids: list[int] = []
    loss: list[bool] = []
    for number, kind in enumerate(kinds):
        ids += [int(tokenizer.image_id or 0)] * PER_IMAGE if kind == "i" else [10_000 + number]
        loss += [False] * PER_IMAGE if kind == "i" else [kind == "t"]
    images = tuple(Image(f"{number}.png") for number in range(kinds.count("i")))
    return TokenizedSample(np.array(ids, np.int32), np.array(loss, np.bool_), images)


@given(kinds=st.text("tci", min_size=1, max_size=60), max_length=st.integers(PER_IMAGE + 1, 30))
@settings(max_examples=300, deadline=None)
def test_every_target_is_trained_exactly_once_with_context_and_no_image_is_cut(
    seeing: Tokenizer, kinds: str, max_length: int
) -> None:
    sample = sample_of(kinds, seeing)
    pieces = split(sample, max_length, seeing)
    assert all(0 < len(piece) <= max_length for piece in pieces)
    trained = [id for piece in pieces for id in labels_of(piece).tolist() if id != IGNORE_INDEX]
    expected = [id for id in labels_of(sample).tolist() if id != IGNORE_INDEX]
    assert trained == expected
    seen = {id for piece in pieces for id in piece.input_ids.tolist()}
    assert seen == set(sample.input_ids.tolist())
    for piece in pieces:
        assert (piece.input_ids == seeing.image_id).sum() == PER_IMAGE * len(piece.images)
    assert {image for piece in pieces for image in piece.images} == set(sample.images)


def test_a_piece_begins_with_the_last_token_of_the_one_before(seeing: Tokenizer) -> None:
    pieces = split(sample_of("t" * 10, seeing), 5, seeing)
    assert [[id - 10_000 for id in piece.input_ids.tolist()] for piece in pieces] == [
        [0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9],
    ]  # fmt: skip
    assert [piece.loss_mask.tolist()[0] for piece in pieces] == [True, False, False]


def test_a_piece_after_an_image_begins_with_that_image_whole(seeing: Tokenizer) -> None:
    pieces = split(sample_of("cittt", seeing), 5, seeing)
    assert [len(piece.images) for piece in pieces] == [1, 1, 0, 0][: len(pieces)]
    assert pieces[1].input_ids.tolist()[:PER_IMAGE] == [seeing.image_id] * PER_IMAGE


def test_a_sample_that_fits_is_one_piece_unchanged(seeing: Tokenizer) -> None:
    sample = sample_of("citt", seeing)
    (piece,) = split(sample, len(sample), seeing)
    assert piece.input_ids.tolist() == sample.input_ids.tolist() and piece.images == sample.images
    assert piece.loss_mask.tolist() == sample.loss_mask.tolist()


def test_an_image_larger_than_a_piece_is_an_error_with_both_numbers(seeing: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"an image takes 4 tokens, more than data\.max_length 3"):
        split(sample_of("cit", seeing), 3, seeing)


@pytest.fixture
def text_only(tiny_llm_path: Path) -> Tokenizer:
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))


def stored(tmp_path: Path, records: list[object], data_map: str, **options: object) -> Data:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records), "utf-8")
    dataset = Dataset(source=use("json", path=str(path)), data_map=data_map)
    return Data.model_validate(
        {"datasets": (dataset,), "chat_template": "chatml", "too_long": "split", "max_bad_fraction": 0.0, **options}
    )


def test_a_document_is_split_with_no_token_lost_and_is_no_repair(
    tmp_path: Path, plugins: Plugins, text_only: Tokenizer
) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    whole = prepare(stored(tmp_path, [{"text": text}], "pretrain", max_length=4096), plugins, text_only, tmp_path)
    store = prepare(stored(tmp_path, [{"text": text}], "pretrain", max_length=64), plugins, text_only, tmp_path)
    pieces = [store[item].input_ids.tolist() for item in range(len(store))]
    assert len(store) > 5 and store.drops == () and max(map(len, pieces)) <= 64
    assert pieces[0] + [id for piece in pieces[1:] for id in piece[1:]] == whole[0].input_ids.tolist()
    assert store.num_trained == whole.num_trained == len(whole[0]) - 1
    assert store.origins is not None and {store.origins.of(i)[1] for i in range(len(store))} == {1}


def test_pieces_of_a_conversation_without_a_target_are_left_out_and_counted(
    tmp_path: Path, plugins: Plugins, text_only: Tokenizer
) -> None:
    record = {"instruction": "why " * 100, "input": "", "output": "so " * 60}
    store = prepare(stored(tmp_path, [record], "alpaca", max_length=64), plugins, text_only, tmp_path)
    (drop,) = store.drops
    assert drop.action == "split" and "of them without a target left out" in drop.reason
    assert all(store[item].loss_mask[1:].any() for item in range(len(store)))


def test_a_split_record_with_no_target_in_any_piece_is_dropped_once(
    tmp_path: Path, plugins: Plugins, text_only: Tokenizer
) -> None:
    turns = [{"role": "user", "content": "why " * 100}, {"role": "assistant", "content": "no", "weight": 0}]
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data = stored(tmp_path, [{"messages": turns}, good], "messages", max_length=64, max_bad_fraction=1.0)
    store = prepare(data, plugins, text_only, tmp_path)
    reason = "nothing to train: no text to learn, such as an answer after a question"
    assert [(drop.record, drop.action, drop.reason) for drop in store.drops] == [(1, "dropped", reason)]

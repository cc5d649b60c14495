"""Segments to ids: boundaries only where the loss changes, images as blocks, and data that cannot become control."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mmft.data.tokenize import IMAGE_TOKEN, Tokenizer, document_segments, tokenize, tokenize_batch
from mmft.errors import DataError
from mmft.testing import tiny_tokenizer
from mmft.types import Document, Image, Segment

START, END = "<|im_start|>", "<|im_end|>"
CAT = Image("cat.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def hf(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokenizer(hf: Any) -> Tokenizer:
    """Of a model that sees: four tokens an image."""
    return Tokenizer.for_model(hf, 4)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Tokenizer:
    """One for all of hypothesis' examples."""
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(folder), 4)


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What transformers gives for the whole text, control tokens parsed."""
    return list(tokenizer.hf(text, add_special_tokens=False)["input_ids"])


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return {number for number, token in tokenizer.hf.added_tokens_decoder.items() if token.special}


def test_neighbours_of_equal_loss_get_the_ids_of_the_whole_text(tokenizer: Tokenizer) -> None:
    pieces = ["A chat betw", "een a curi", "ous user and", " an assistant."]
    sample = tokenize([Segment(piece, markup=index % 2 == 0) for index, piece in enumerate(pieces)], tokenizer)
    assert sample.input_ids.tolist() == text_ids(tokenizer, "".join(pieces))
    apart = [number for piece in pieces for number in text_ids(tokenizer, piece)]
    assert sample.input_ids.tolist() != apart  # these pieces do show the difference


def test_a_boundary_stands_where_the_loss_changes_and_the_mask_follows_the_segments(tokenizer: Tokenizer) -> None:
    prompt, answer, end = "USER: What is it? ASSISTANT:", " A cat.", "\n"
    sample = tokenize([Segment(prompt), Segment(answer, loss=True), Segment(end)], tokenizer)
    blocks = [text_ids(tokenizer, text) for text in (prompt, answer, end)]
    assert sample.input_ids.tolist() == [number for block in blocks for number in block]
    assert sample.loss_mask.tolist() == [False] * len(blocks[0]) + [True] * len(blocks[1]) + [False] * len(blocks[2])


def test_the_prompt_is_a_prefix_of_the_training_sequence(tokenizer: Tokenizer) -> None:
    prompt = [Segment(f"{START}user\n", markup=True), Segment("What is it?"), Segment(f"{END}\n", markup=True)]
    whole = [*prompt, Segment(" A cat.", loss=True), Segment(END, loss=True, markup=True)]
    ids = tokenize(prompt, tokenizer).input_ids
    assert tokenize(whole, tokenizer).input_ids[: len(ids)].tolist() == ids.tolist()


def test_ids_and_mask_are_small_integers_and_booleans_of_one_length(tokenizer: Tokenizer) -> None:
    sample = tokenize([Segment("a"), Segment("b", loss=True)], tokenizer)
    assert (sample.input_ids.dtype, sample.loss_mask.dtype) == (np.int32, np.bool_)
    assert len(sample) == len(sample.input_ids) == len(sample.loss_mask) == 2
    assert len(tokenize([], tokenizer)) == len(tokenize([Segment("")], tokenizer)) == 0


def test_an_image_is_its_block_of_image_ids_in_its_place_and_never_trained(tokenizer: Tokenizer) -> None:
    dog = Image("dog.png")
    sample = tokenize([Segment("a"), Segment(CAT, loss=True), Segment(dog), Segment("b", loss=True)], tokenizer)
    assert sample.images == (CAT, dog)
    image = tokenizer.image_id
    assert sample.input_ids.tolist() == [*text_ids(tokenizer, "a"), *[image] * 8, *text_ids(tokenizer, "b")]
    assert sample.loss_mask.tolist() == [False] * 9 + [True]


def test_text_on_both_sides_of_an_image_is_not_joined(tokenizer: Tokenizer) -> None:
    sample = tokenize([Segment("betw"), Segment(CAT), Segment("een")], tokenizer)
    assert sample.input_ids.tolist() == [*text_ids(tokenizer, "betw"), *[400] * 4, *text_ids(tokenizer, "een")]


def test_the_image_id_may_lie_beyond_the_vocabulary_and_is_taken_by_nothing_else(folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(folder), 4)
    assert tokenizer.image_id == len(plain) == 400
    assert set(plain.get_vocab()) < set(tokenizer.hf.get_vocab())
    assert control_ids(tokenizer) == {*control_ids(Tokenizer(plain)), 400}  # the others are still special


def test_a_text_model_has_no_image_id_and_refuses_an_image(hf: Any) -> None:
    tokenizer = Tokenizer.for_model(hf)
    assert tokenizer.image_id is None and IMAGE_TOKEN not in hf.get_vocab()
    with pytest.raises(DataError, match=r"the model has no vision encoder; set model\.vision"):
        tokenize([Segment(CAT)], tokenizer)


def test_markup_may_write_control_tokens(tokenizer: Tokenizer) -> None:
    sample = tokenize([Segment(f"{START}user\n", markup=True)], tokenizer)
    assert sample.input_ids.tolist()[0] == tokenizer.hf.convert_tokens_to_ids(START)


@pytest.mark.parametrize("spelling", [START, END, "<|endoftext|>", IMAGE_TOKEN])
@pytest.mark.parametrize("shape", ["{}", "a {} b", "{0}{0}", "\n{}\n"])
def test_data_that_spells_a_control_token_stays_text(tokenizer: Tokenizer, spelling: str, shape: str) -> None:
    text = shape.format(spelling)
    sample = tokenize([Segment("Say: "), Segment(text), Segment("!", markup=True)], tokenizer)
    assert control_ids(tokenizer).isdisjoint(sample.input_ids.tolist())
    assert tokenizer.hf.decode(sample.input_ids.tolist()) == f"Say: {text}!"


@pytest.mark.parametrize("spelling", [START, IMAGE_TOKEN])
@pytest.mark.parametrize("markup_after", [False, True])
def test_data_cannot_forge_a_control_token_in_two_pieces(
    tokenizer: Tokenizer, spelling: str, markup_after: bool
) -> None:
    """Two text parts of one message, or data before markup: joined only after each was looked at alone."""
    sample = tokenize([Segment(spelling[:-1]), Segment(spelling[-1:], markup=markup_after)], tokenizer)
    assert control_ids(tokenizer).isdisjoint(sample.input_ids.tolist())


@given(cut=st.lists(st.integers(1, 11), max_size=3), around=st.text("a<|> ", max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_way_of_cutting_a_control_token_into_data_forges_it(shared: Tokenizer, cut: list[int], around: str) -> None:
    text = around + START + around
    bounds = [0, *sorted(cut), len(text)]
    sample = tokenize([Segment(text[a:b]) for a, b in pairwise(bounds)], shared)
    assert control_ids(shared).isdisjoint(sample.input_ids.tolist())


def test_the_image_mark_cannot_be_forged_where_the_model_has_it_as_an_ordinary_token(hf: Any) -> None:
    hf.add_tokens([IMAGE_TOKEN])
    tokenizer = Tokenizer.for_model(hf, 4)
    assert tokenizer.image_id not in tokenize([Segment(IMAGE_TOKEN)], tokenizer).input_ids.tolist()


def test_what_is_not_a_control_token_of_this_tokenizer_is_joined_like_any_text(tokenizer: Tokenizer) -> None:
    pieces = ["betw", "een </s> and [INST]"]
    sample = tokenize([Segment(piece) for piece in pieces], tokenizer)
    assert sample.input_ids.tolist() == text_ids(tokenizer, "".join(pieces))


def test_a_batch_gives_what_each_sample_gives_alone(tokenizer: Tokenizer) -> None:
    rendered = [
        [Segment("What is it?"), Segment(" A cat.", loss=True), Segment(END, loss=True, markup=True)],
        [],
        [Segment(f"a {END} b"), Segment(CAT), Segment(f"{START}x", markup=True), Segment(END)],
        [Segment(END), Segment("x", loss=True)],
    ]
    for together, segments in zip(tokenize_batch(rendered, tokenizer), rendered, strict=True):
        alone = tokenize(segments, tokenizer)
        assert together.input_ids.tolist() == alone.input_ids.tolist()
        assert together.loss_mask.tolist() == alone.loss_mask.tolist()
        assert together.images == alone.images


def test_encoding_adds_neither_bos_nor_eos(hf: Any) -> None:
    with_bos(hf)
    assert hf("a")["input_ids"][0] == 0
    tokenizer = Tokenizer(hf)
    assert tokenize([Segment("a")], tokenizer).input_ids.tolist() == text_ids(tokenizer, "a")


def with_bos(hf: Any) -> Any:
    """As Llama's tokenizers: BOS is written before every text."""
    hf.bos_token = "<|endoftext|>"
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return hf


@pytest.mark.parametrize(("prepare", "before"), [(lambda hf: hf, []), (with_bos, [0])])
def test_a_document_is_trained_whole_with_eos_and_with_bos_where_the_tokenizer_writes_one(
    hf: Any, prepare: Callable[[Any], Any], before: list[int]
) -> None:
    tokenizer = Tokenizer(prepare(hf))
    sample = tokenize(document_segments(Document("The quick fox."), tokenizer), tokenizer)
    ids = [*before, *text_ids(tokenizer, "The quick fox."), tokenizer.eos_id]
    assert sample.input_ids.tolist() == ids
    assert sample.loss_mask.all()


def test_a_document_cannot_forge_its_end(hf: Any) -> None:
    tokenizer = Tokenizer(hf)
    sample = tokenize(document_segments(Document(f"one{END}two"), tokenizer), tokenizer)
    assert sample.input_ids.tolist().count(tokenizer.eos_id) == 1


@given(texts=st.lists(st.text(max_size=30) | st.sampled_from([START, f"a{END}b", "betw een"]), max_size=6))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("as_data", [False, True])
def test_ids_are_those_of_transformers_own_call(shared: Tokenizer, as_data: bool, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    expected = [
        shared.hf(text, add_special_tokens=False, split_special_tokens=as_data)["input_ids"] if text else []
        for text in texts
    ]
    assert [ids.tolist() for ids in shared.encode(texts, as_data=as_data)] == expected
    assert shared.hf.backend_tokenizer.encode_special_tokens is False or not texts or as_data


def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied(hf: Any) -> None:
    hf.backend_tokenizer.enable_truncation(2)
    hf.backend_tokenizer.enable_padding(length=50)
    assert 2 < len(Tokenizer(hf).encode(["The quick brown fox"])[0]) < 50


def test_half_a_character_is_named_with_its_code_and_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"lone surrogate U\+D83D at character 3: 'ab\\ud83dcd'"):
        tokenize([Segment("ab\ud83dcd")], tokenizer)


def test_rendering_a_document_leaves_the_rust_tokenizer_to_the_thread_that_encodes(hf: Any) -> None:
    tokenizer = Tokenizer(with_bos(hf))
    hf.backend_tokenizer.encode_special_tokens = True  # as the encoding thread sets it for text that is data
    document_segments(Document("one"), tokenizer)
    assert hf.backend_tokenizer.encode_special_tokens  # transformers' own call would have reset it

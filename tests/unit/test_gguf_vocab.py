"""What a tokenizer becomes in a GGUF file; whether llama.cpp then gives the same ids is in test_convert_gguf."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmft.convert.gguf.vocab import find_cut, read_vocabulary
from mmft.errors import ModelError

CORPUS = ("The quick brown fox jumps over the lazy dog 0123456789.", "def add(a, b):\n    return a + b", "你好，世界。")
# as these models' tokenizer.json have it
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")


def byte_level(cutter, *, whole_words=False, normalizer=None):
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer, core.decoder = cutter, decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    hf.add_tokens(["<tool>"])
    return hf


def split(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
CUTTERS = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "smollm": (DIGITS, {}),
    "llama-bpe": (split(LLAMA_3), {"whole_words": True}),
    "smaug-bpe": (split(LLAMA_3), {}),
    "qwen2": (split(QWEN_2), {"normalizer": normalizers.NFC()}),
}


def cut_of(hf):
    return find_cut(hf, json.loads(hf.backend_tokenizer.to_str()))


@pytest.mark.parametrize("name", CUTTERS)
def test_the_way_of_cutting_is_told_from_what_it_does(name):
    cutter, options = CUTTERS[name]
    assert cut_of(byte_level(cutter, **options)) == name


@pytest.mark.parametrize(
    ("cutter", "options", "told"),
    [
        (split(r"\w+|\W"), {}, r"cuts texts .*as none known here \(gpt-2, smollm"),
        (split(QWEN_2), {"whole_words": True}, "none known here"),
        (pre_tokenizers.ByteLevel(False), {"normalizer": normalizers.Lowercase()}, "changes texts.*Lowercase"),
    ],
    ids=["other words", "a known cut with other merging", "lower case"],
)
def test_a_tokenizer_that_no_known_one_equals_is_refused(cutter, options, told):
    with pytest.raises(ModelError, match=told):
        cut_of(byte_level(cutter, **options))


def test_rows_without_a_token_are_filled_and_tokens_without_a_row_left_out():
    from gguf import TokenType

    hf = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    known = len(hf)
    hf.add_special_tokens({"additional_special_tokens": ["<image>"]})
    found = read_vocabulary(hf, known + 3, hidden=hf.convert_tokens_to_ids("<image>"))
    assert found.tokens[known:] == ("<image>", f"[PAD{known + 1}]", f"[PAD{known + 2}]")
    assert set(found.types[known:]) == {TokenType.UNUSED}  # a text that spells it must not become it
    assert found.types[hf.convert_tokens_to_ids("<|end|>")] == TokenType.CONTROL
    assert found.types[hf.convert_tokens_to_ids("<tool>")] == TokenType.USER_DEFINED
    assert len(read_vocabulary(hf, known).tokens) == known
    assert all(len(merge.split(" ")) == 2 for merge in found.merges)


def test_a_unigram_tokenizer_is_refused_with_what_is_written():
    hf = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)))
    with pytest.raises(ModelError, match="kind Unigram; written here are byte-level BPE"):
        read_vocabulary(hf, 2)

"""What of an answer's tokens becomes text, and when it ends."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mmft.errors import DataError
from mmft.generation import Generation, Writer, cut_at


@pytest.fixture(scope="module")
def tokenizer(tiny_llm_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llm_path)


def written(tokenizer: Any, text: str, *stop: str, end: str = "<|im_end|>") -> tuple[list[str], Writer, int]:
    """The pieces of a text fed token by token, the writer, and how many tokens it took."""
    pieces: list[str] = []
    ids = tokenizer(text + end)["input_ids"]
    writer = Writer(tokenizer, [tokenizer.eos_token_id], stop, pieces.append, Event())
    for number in range(1, len(ids) + 1):
        if bool(writer(torch.tensor([ids[:number]]), torch.empty(0))):
            break
    writer.end()
    return pieces, writer, number


@pytest.mark.parametrize(
    "text", ["A cat.", "你好，世界 ✓ — «quotes»", "def f(x):\n    return x  ", "🦙🦙 two", "a" * 500]
)
def test_the_pieces_are_the_text_in_whole_characters(tokenizer: Any, text: str) -> None:
    pieces, writer, _ = written(tokenizer, text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert writer.finish == "stop"


def test_an_answer_begins_without_the_space_after_its_prompt(tokenizer: Any) -> None:
    assert "".join(written(tokenizer, " \n A cat.")[0]) == "A cat."


def test_no_control_token_is_shown(tokenizer: Any) -> None:
    assert "".join(written(tokenizer, "A<|im_start|> cat.")[0]) == "A cat."


@pytest.mark.parametrize("stop", [("\nUSER:",), ("USER", "\nU"), ("nowhere", "\nUSER:")])
def test_nothing_from_a_stop_string_on_is_shown_and_the_answer_ends_there(tokenizer: Any, stop: tuple[str]) -> None:
    pieces, writer, tokens = written(tokenizer, "A cat.\nUSER: And?", *stop)
    assert "".join(pieces) in ("A cat.", "A cat.\n")
    assert (writer.finish, tokens < len(tokenizer("A cat.\nUSER: And?")["input_ids"])) == ("stop", True)


def test_the_beginning_of_a_stop_string_is_shown_once_it_is_none(tokenizer: Any) -> None:
    assert "".join(written(tokenizer, "A cat.\nUSE it", "\nUSER:")[0]) == "A cat.\nUSE it"
    assert "".join(written(tokenizer, "A cat.\nUSE", "\nUSER:")[0]) == "A cat.\nUSE"


def test_an_answer_that_was_cut_off_says_so(tokenizer: Any) -> None:
    assert written(tokenizer, "A cat and", end="")[1].finish == "length"


def test_a_cancelled_answer_ends_at_its_next_token(tokenizer: Any) -> None:
    cancel = Event()
    writer = Writer(tokenizer, [], (), lambda text: cancel.set(), cancel)
    ids = tokenizer("A cat. A dog.")["input_ids"]
    assert bool(writer(torch.tensor([ids[:1]]), torch.empty(0)))
    assert writer.finish == "cancelled"


def test_half_a_character_at_the_end_is_shown_as_broken(tokenizer: Any) -> None:
    ids = tokenizer("A 🦙")["input_ids"]
    pieces: list[str] = []
    writer = Writer(tokenizer, [], (), pieces.append, Event())
    for number in range(1, len(ids)):
        writer(torch.tensor([ids[:number]]), torch.empty(0))
    writer.end()
    assert "".join(pieces).startswith("A ") and "".join(pieces).endswith("\ufffd")


def test_a_long_answer_costs_the_same_for_each_token(tokenizer: Any) -> None:
    """Every step decodes a handful of tokens, not the answer so far."""
    longest = 0
    decode = tokenizer.decode

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(decode(ids, **options))

    ids = tokenizer("The quick brown fox. 你好 " * 100)["input_ids"]
    writer = Writer(Counting(), [], (), lambda text: None, Event())
    for number in range(1, len(ids) + 1):
        writer(torch.tensor([ids[:number]]), torch.empty(0))
    assert longest < 12 < len(ids)


def test_a_whole_answer_is_cut_at_its_first_stop_string() -> None:
    assert cut_at("A cat.\nUSER: And?", ("USER", "\nUSER:")) == "A cat."
    assert cut_at("A cat.", ()) == "A cat."


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0: allowed is 0 \(greedy\), or 0\.0001 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: allowed is above 0, at most 1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: allowed is a whole number from 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": ("",)}, "stop="),
    ],
)
def test_a_setting_no_sampler_takes_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Generation(**setting)

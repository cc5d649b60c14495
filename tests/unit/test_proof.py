"""The template proof: what it accepts, what it shows side by side, and when it refuses a run."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mmft.config import Data
from mmft.data.proof import Difference, prove_template, refuse_difference, report
from mmft.data.tokenize import Tokenizer
from mmft.errors import ConfigError
from mmft.specs import ChatTemplate
from mmft.testing import CHATML, tiny_tokenizer
from mmft.types import Conversation, Segment
from mmft_plugins.templates import AUTO, CHATML_TEMPLATE, LLAMA3_TEMPLATE, PLAIN, VICUNA

DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n{% endif %}" + CHATML
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DATA: Any = {"datasets": ({"source": {"name": "json", "options": {}}, "data_map": "alpaca"},), "max_length": 64}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[..., Tokenizer]:
    def tokenizer(jinja: str | None = CHATML, **options: Any) -> Tokenizer:
        hf = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "t", chat_template=jinja or "", **options))
        hf.chat_template = jinja
        return Tokenizer(hf)

    return tokenizer


def changed(change: Callable[[Segment], Segment]) -> ChatTemplate:
    """ChatML with every segment changed."""
    return replace(CHATML_TEMPLATE, render=partial(render_changed, change))


def render_changed(
    change: Callable[[Segment], Segment], conversation: Conversation, /, *, generation_prompt: bool = False
) -> Sequence[Segment]:
    return [change(s) for s in CHATML_TEMPLATE.render(conversation, generation_prompt=generation_prompt)]


def test_the_models_own_format_is_proved(tokenizer: Callable[..., Tokenizer]) -> None:
    assert prove_template(CHATML_TEMPLATE, tokenizer()) == []


def test_a_difference_is_shown_side_by_side_with_its_place_marked(tokenizer: Callable[..., Tokenizer]) -> None:
    found = prove_template(CHATML_TEMPLATE, tokenizer(DEFAULT))
    assert [difference.case for difference in found] == ["one turn", "two turns, no system", "unicode", "white space"]
    head, ours, theirs, mark = str(found[0]).splitlines()
    assert head == "one turn: the conversation differs"
    assert ours.startswith("  this template  <|im_start|>user\\nWhat is it?")
    assert theirs.startswith("  the model's    <|im_start|>system\\nYou are Tiny.")
    place = mark.index("^")
    assert ours[:place].split()[-1] == theirs[:place].split()[-1] == "<|im_start|>"
    assert (ours[place], theirs[place]) == ("u", "s")
    assert report(found, limit=1).endswith("\nand 3 more")


def test_a_difference_far_into_the_text_is_cut_to_what_stands_around_it() -> None:
    shown = str(Difference("case", "it differs", "x" * 500 + "a", "x" * 500 + "b", 500)).splitlines()
    assert max(map(len, shown)) < 120
    assert (shown[1][shown[3].index("^")], shown[2][shown[3].index("^")]) == ("a", "b")


def test_a_run_is_refused_unless_the_difference_is_allowed(
    tokenizer: Callable[..., Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    other = tokenizer(DEFAULT)
    with pytest.raises(ConfigError, match=r"(?s)'chatml' is not .*4 differences.*first difference.*'auto'.*allow_"):
        refuse_difference(CHATML_TEMPLATE, other, Data.model_validate(DATA))
    with caplog.at_level(logging.WARNING):
        refuse_difference(CHATML_TEMPLATE, other, Data.model_validate({**DATA, "allow_template_difference": True}))
    assert "first difference" in caplog.text
    refuse_difference(CHATML_TEMPLATE, tokenizer(), Data.model_validate(DATA))


def test_a_model_without_a_template_has_nothing_to_compare(
    tokenizer: Callable[..., Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert prove_template(CHATML_TEMPLATE, tokenizer(None)) == []
    assert "none of its own to compare with" in caplog.text


def test_control_tokens_the_tokenizer_lacks_are_a_difference_even_then(tokenizer: Callable[..., Tokenizer]) -> None:
    found = prove_template(LLAMA3_TEMPLATE, tokenizer(None))
    assert str(found[0]).startswith("control tokens: this tokenizer has no control token '<|eot_id|>': it would be ")


def test_auto_is_compared_with_nothing_but_its_labels(tokenizer: Callable[..., Tokenizer]) -> None:
    assert prove_template(AUTO, tokenizer(DEFAULT)) == []


def test_auto_that_cannot_be_bound_is_a_problem_of_the_config(tokenizer: Callable[..., Tokenizer]) -> None:
    with pytest.raises(ConfigError, match=r"data.chat_template: chat template 'auto': .* no chat_template"):
        refuse_difference(AUTO, tokenizer(None), Data.model_validate(DATA))


def test_llavas_plain_is_no_chat_format_and_exempt(tokenizer: Callable[..., Tokenizer]) -> None:
    other = tokenizer()
    assert prove_template(PLAIN, other) == prove_template(PLAIN.for_tokenizer(other.hf), other) == []
    assert prove_template(VICUNA, other) != []


def test_what_the_models_own_template_refuses_is_skipped_and_noted_for_debugging_only(
    tokenizer: Callable[..., Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mmft.data.proof"):
        assert prove_template(CHATML_TEMPLATE, tokenizer(REFUSES_SYSTEM)) == []
    assert not caplog.text, "no user can act on it: every run would say so"
    with caplog.at_level(logging.DEBUG, logger="mmft.data.proof"):
        prove_template(CHATML_TEMPLATE, tokenizer(REFUSES_SYSTEM))
    assert "empty system: skipped, the model's own template refuses it: no system" in caplog.text


def test_a_template_that_trains_an_answer_without_its_end_is_found(tokenizer: Callable[..., Tokenizer]) -> None:
    silent = changed(lambda s: replace(s, loss=s.loss and s.content != "<|im_end|>"))
    found = prove_template(silent, tokenizer())
    assert "a trained turn ends in 'A cat.' and not in what ends a turn (<|im_end|>)" in str(found[0])
    assert "no token is trained" in str(prove_template(changed(lambda s: replace(s, loss=False)), tokenizer())[0])


def test_a_template_that_lets_data_forge_control_tokens_is_found(tokenizer: Callable[..., Tokenizer]) -> None:
    found = prove_template(changed(lambda s: replace(s, markup=True)), tokenizer())
    assert [difference.case for difference in found] == ["text that spells control tokens"]
    assert "a user could forge '<|endoftext|>', '<|im_start|>', '<|im_end|>'" in str(found[0])


def test_todays_date_in_the_models_template_is_pinned(tokenizer: Callable[..., Tokenizer]) -> None:
    dated = tokenizer("{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML)
    shown = str(prove_template(CHATML_TEMPLATE, dated)[0])
    assert "26 Jul 2024" in shown


PARTS = """
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string -%}{{ m.content }}{%- else -%}
{%- for p in m.content -%}{{ p.text if p.type == 'text' else IMAGE }}{%- endfor -%}AFTER{%- endif -%}
{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def test_an_image_must_stand_where_the_models_template_puts_it(tokenizer: Callable[..., Tokenizer]) -> None:
    there = tokenizer(PARTS.replace("IMAGE", "'<img>'").replace("AFTER", ""))
    assert prove_template(CHATML_TEMPLATE, there) == []
    behind = tokenizer(PARTS.replace("IMAGE", "''").replace("AFTER", "{{ '<img>' if m.content | length == 2 }}"))
    assert [difference.case for difference in prove_template(CHATML_TEMPLATE, behind)] == ["images"]

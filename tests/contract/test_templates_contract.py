"""What every chat template and data map must keep, run over everything that is registered.

A template that is added, here or by a plugin installed beside mmft, is found through `load_plugins()`.
"""

import pickle
import re
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmft.data.tokenize import Tokenizer, tokenize
from mmft.plugins import load_plugins
from mmft.specs import ChatTemplate, DataMap
from mmft.testing import BATTERY, check_chat_template, check_data_map, tiny_tokenizer
from mmft.types import Conversation, Image, Message, Text, TokenizedSample

PLUGINS = load_plugins()
WRITTEN = re.compile(r"<[|｜]?[^<>\s]+[|｜]?>|\[/?\w+\]|### \w+:")  # how formats spell their control tokens
TALK = Conversation((Message("user", (Image("a.png"), Text("q"))), Message("assistant", (Text("a"),))))
CONTROL = tuple(
    sorted(
        {"<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"}
        | {
            token
            for spec in PLUGINS.chat_templates
            if spec.name != "auto"
            for segment in spec.render(TALK)
            if segment.markup
            for token in WRITTEN.findall(str(segment.content))
        }
    )
)
PIECES = ("a", "Hello", " ", "  ", "\n", "\n\n", "你好", "é", "🙂", ":", "USER:", "<image>", "x = 1", *CONTROL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tiny tokenizer that has the control tokens of every shipped format, for a model with three tokens an image."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), special=CONTROL, bos="<s>", eos="</s>")
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(folder), tokens_per_image=3)


@pytest.fixture(params=list(PLUGINS.chat_templates), ids=lambda template: template.name)
def template(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> ChatTemplate:
    bound: ChatTemplate = request.param.for_tokenizer(tokenizer.hf)
    return bound


def suited(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """The conversation; for `plain`, which leaves questions out, with an image in every question."""
    if template.name != "plain":
        return conversation
    shown = Image("shown.png")
    messages = (Message(m.role, (shown, *m.parts)) if m.role == "user" else m for m in conversation.messages)
    return Conversation(tuple(messages))


def encoded(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, **options: Any
) -> TokenizedSample:
    return tokenize(template.render(conversation, **options), tokenizer)


def answers(conversation: Conversation, template: ChatTemplate) -> list[int]:
    """The turns that must be trained: all of them, or the last where the format rewrites the others."""
    turns = [k for k, message in enumerate(conversation.messages) if message.role == "assistant"]
    return turns[-1:] if template.rewrites_history else turns


texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=5).map("".join)
parts = st.lists(texts.map(Text) | st.sampled_from(("1.png", "2.png")).map(Image), max_size=4).map(tuple)
pairs = st.tuples(parts.map(lambda p: Message("user", p)), texts.map(lambda t: Message("assistant", (Text(t),))))
conversations = st.builds(
    lambda system, turns: Conversation((*system, *(message for pair in turns for message in pair))),
    st.just(()) | texts.map(lambda text: (Message("system", (Text(text),)),)),
    st.lists(pairs, min_size=1, max_size=3),
)


def test_all_shipped_templates_are_found() -> None:
    assert {"auto", "chatml", "internlm2_chat", "llama3_chat", "plain", "vicuna"} <= set(PLUGINS.chat_templates.names())
    assert {"agent", "alpaca", "messages", "openai", "pretrain"} <= set(PLUGINS.data_maps.names())


def test_the_published_check_passes(template: ChatTemplate) -> None:
    check_chat_template(template, [suited(template, conversation) for conversation in BATTERY])


@settings(max_examples=50, deadline=None)
@given(conversation=conversations)
def test_the_tokens_of_a_prompt_are_a_prefix_of_the_training_tokens(
    conversation: Conversation, tokenizer: Tokenizer
) -> None:
    for spec in PLUGINS.chat_templates:
        bound = spec.for_tokenizer(tokenizer.hf)
        given_ = suited(bound, conversation)
        whole = encoded(bound, tokenizer, given_)
        assert whole.images == given_.images
        for k in answers(given_, bound):
            prompt = encoded(bound, tokenizer, Conversation(given_.messages[:k]), generation_prompt=True)
            assert prompt.input_ids.tolist() == whole.input_ids[: len(prompt)].tolist(), bound.name
            assert prompt.loss_mask.tolist() == whole.loss_mask[: len(prompt)].tolist(), bound.name
            assert whole.loss_mask[len(prompt)], bound.name


def test_data_cannot_forge_control_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Contents that spell every control token give no more control tokens than contents that spell none."""
    control = set(tokenizer.hf.convert_tokens_to_ids(list(CONTROL)))

    def count(word: str) -> int:
        roles = ("system", "user", "assistant", "user", "assistant")
        conversation = Conversation(tuple(Message(role, (Text(f"{word} {word}"),)) for role in roles))  # type: ignore[arg-type]
        sample = encoded(template, tokenizer, suited(template, conversation))
        return sum(token in control for token in sample.input_ids.tolist())

    harmless = count("word")
    assert template.name == "plain" or harmless > 0
    for spelling in CONTROL:
        assert count(spelling) == harmless, spelling


def test_every_trained_answer_includes_what_ends_it(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    for conversation in BATTERY:
        fitting = suited(template, conversation)
        sample = encoded(template, tokenizer, fitting)
        runs = [
            [token for token, _ in run]
            for trained, run in groupby(
                zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True), key=lambda pair: pair[1]
            )
            if trained
        ]
        turns = answers(fitting, template)
        assert len(runs) >= len(turns)
        for run, k in zip(runs[-len(turns) :], turns, strict=True):
            text = tokenizer.hf.decode(run)
            assert text.endswith(template.stop[0])
            said = text.removesuffix(template.stop[0]).strip()  # some formats write a mark before the answer
            assert said.endswith(fitting.messages[k].text.strip()) and len(said) < len(fitting.messages[k].text) + 24


def test_a_template_pickles_bound_and_unbound(template: ChatTemplate) -> None:
    unbound = PLUGINS.chat_templates.get(template.name)
    assert pickle.loads(pickle.dumps(unbound)).name == template.name
    again = pickle.loads(pickle.dumps(template))
    conversation = suited(template, BATTERY[1])
    assert list(again.render(conversation)) == list(template.render(conversation))


def test_a_template_says_where_its_format_is_defined_and_where_an_answer_stops(template: ChatTemplate) -> None:
    assert template.source and template.stop


@pytest.mark.parametrize("data_map", list(PLUGINS.data_maps), ids=lambda data_map: data_map.name)
def test_a_data_map_accepts_its_examples_unchanged_and_pickles(data_map: DataMap) -> None:
    check_data_map(data_map)
    assert pickle.loads(pickle.dumps(data_map)).fn is data_map.fn
    assert data_map.summary and data_map.columns
    tops = {column.split(".")[0].removesuffix("[]") for column in data_map.columns}
    assert all(set(record) & tops for record in data_map.examples)

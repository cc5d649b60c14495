"""What each chat template writes and trains, seen as text: `[...]` stands around what is trained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from template_talk import TALK, data, shown, talk
from transformers import AutoTokenizer

from mmft.config import Data, Dataset, use
from mmft.data.dataset import prepare
from mmft.data.feed import Account, StreamFeed
from mmft.data.stream import SampleStream
from mmft.data.tokenize import Tokenizer
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Role, Text, ToolCall
from mmft_plugins.templates import (
    CHATML_TEMPLATE,
    INTERNLM2_TEMPLATE,
    LLAMA3_TEMPLATE,
    PLAIN,
    VICUNA,
    VICUNA_SYSTEM,
)

LLAMA_TOKENS = {"special": ("<unk>", "<s>", "</s>"), "eos": "</s>", "bos": "<s>"}


# chatml, internlm2_chat, llama3_chat


def test_chatml_has_no_default_system_and_the_newline_after_an_answer_is_not_trained() -> None:
    assert shown(CHATML_TEMPLATE.render(talk(*TALK))) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[Ciao<|im_end|>]\n"
    )


def test_internlm2_writes_bos_once_before_everything() -> None:
    text = shown(INTERNLM2_TEMPLATE.render(talk(("system", "S"), *TALK), generation_prompt=True))
    assert text.startswith("<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi") and text.count("<s>") == 1
    assert text.endswith("[Ciao<|im_end|>]\n<|im_start|>assistant\n")


def test_llama3_strips_contents_as_its_jinja_does() -> None:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert shown(LLAMA3_TEMPLATE.render(talk(("user", " Hi\n"), ("assistant", "\n Hello  ")))) == (
        f"<|begin_of_text|>{header.format('user')}Hi<|eot_id|>{header.format('assistant')}[Hello<|eot_id|>]"
    )


def test_llama3_strips_the_ends_of_a_message_and_not_what_stands_around_its_images() -> None:
    parts = (Text(" "), Text("\n a "), Image("1"), Text(" b "), Image("2"), Text(" \n"), Text(""))
    segments = LLAMA3_TEMPLATE.render(Conversation((Message("user", parts),)))
    assert data(segments) == ["a ", Image("1"), " b ", Image("2")]


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, INTERNLM2_TEMPLATE, LLAMA3_TEMPLATE, VICUNA])
def test_a_message_with_loss_off_is_not_trained_nor_is_its_end(template: ChatTemplate) -> None:
    first = Message("assistant", (Text("Hello"),), loss=False)
    conversation = Conversation((talk(*TALK).messages[0], first, *talk(*TALK).messages[2:]))
    trained = [segment.content for segment in template.render(conversation) if segment.loss]
    assert "".join(map(str, trained)).strip() == f"Ciao{template.stop[0]}"


# tools

TOOL: Mapping[str, Any] = {"type": "function", "function": {"name": "f"}}
TOOL_TALK = Conversation(
    (
        *talk(("system", "S"), ("user", "q")).messages,
        Message("assistant", (Text("Wait."),), (ToolCall("f", {"a": "ä"}), ToolCall("g", {}))),
        *talk(("tool", "one"), ("tool", "two"), ("assistant", "Done.")).messages,
    ),
    (TOOL,),
)


def test_calls_are_trained_and_tool_output_is_never_a_target() -> None:
    text = shown(CHATML_TEMPLATE.render(TOOL_TALK))
    assert text.endswith(
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        '[Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": "ä"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>]\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[Done.<|im_end|>]\n"
    )
    asked = Message("tool", (Text("secret"),), loss=True)
    assert "[" not in shown(CHATML_TEMPLATE.render(Conversation((asked,))))


def test_tools_without_a_system_message_get_a_system_turn_of_their_own() -> None:
    conversation = Conversation(TOOL_TALK.messages[1:], TOOL_TALK.tools)
    begin = "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query."
    assert shown(CHATML_TEMPLATE.render(conversation)).startswith(begin)
    assert shown(CHATML_TEMPLATE.render(TOOL_TALK)).startswith(begin.replace("# Tools", "S\n\n# Tools"))


def test_tool_schemas_arguments_and_results_are_data() -> None:
    pieces = data(CHATML_TEMPLATE.render(TOOL_TALK))
    assert pieces[1] == '\n{"type": "function", "function": {"name": "f"}}'
    assert {"f", '{"a": "ä"}', "one", "two"} < set(pieces)


@pytest.mark.parametrize("template", [INTERNLM2_TEMPLATE, LLAMA3_TEMPLATE, VICUNA, PLAIN], ids=lambda t: t.name)
@pytest.mark.parametrize(
    "conversation",
    [
        talk(*TALK, tools=(TOOL,)),
        Conversation((Message("assistant", (), (ToolCall("f", {}),)),)),
        talk(("user", "q"), ("tool", "x")),
    ],
    ids=["tools", "call", "result"],
)
def test_a_format_without_tools_refuses_them_by_its_name(template: ChatTemplate, conversation: Conversation) -> None:
    with pytest.raises(DataError, match=f"chat template '{template.name}' has no form for tools.*choose 'chatml'"):
        template.render(conversation)


# vicuna and plain


def test_vicuna_is_llavas_v1_and_the_space_belongs_to_the_answer() -> None:
    assert shown(VICUNA.render(talk(*TALK))) == (
        f"<s>{VICUNA_SYSTEM} USER: Hi ASSISTANT:[ Hello</s>]USER: Bye ASSISTANT:[ Ciao</s>]"
    )
    assert shown(VICUNA.render(talk(*TALK[:3]), generation_prompt=True)).endswith("[ Hello</s>]USER: Bye ASSISTANT:")


@pytest.mark.parametrize(("system", "begin"), [("Be kind.", "<s>Be kind. USER: Hi"), ("", "<s>USER: Hi")])
def test_a_system_message_replaces_vicunas_preamble(system: str, begin: str) -> None:
    assert shown(VICUNA.render(talk(("system", system), *TALK))).startswith(begin)


def test_vicuna_shows_an_image_where_it_stands() -> None:
    question = Message("user", (Image("1"), Text("\nWhat? "), Image("2")))
    assert shown(VICUNA.render(Conversation((question,)), generation_prompt=True)).endswith(
        "USER: {1}\nWhat? {2} ASSISTANT:"
    )


def test_vicuna_takes_the_tokens_of_another_tokenizer(tokenizer: Callable[..., Any]) -> None:
    bound = VICUNA.for_tokenizer(tokenizer(eos="<|endoftext|>"))
    assert shown(bound.render(talk(*TALK[:2]))) == f"{VICUNA_SYSTEM} USER: Hi ASSISTANT:[ Hello<|endoftext|>]"
    assert bound.stop == ("<|endoftext|>",)


def test_vicuna_writes_llamas_bos_even_where_the_tokenizer_does_not_prepend_it(tokenizer: Callable[..., Any]) -> None:
    llama = tokenizer(**LLAMA_TOKENS)
    assert llama("")["input_ids"] == []
    assert shown(VICUNA.for_tokenizer(llama).render(talk(*TALK))) == shown(VICUNA.render(talk(*TALK)))


def test_vicuna_needs_an_end_of_sequence_token(tokenizer: Callable[..., Any]) -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="'vicuna': the tokenizer has no end-of-sequence token"):
        VICUNA.for_tokenizer(endless)


def test_plain_is_image_and_caption_without_the_question() -> None:
    question = Message("user", (Text("Describe "), Image("1"), Text(" briefly.")))
    conversation = Conversation((talk(("system", "S")).messages[0], question, *talk(("assistant", "a cat")).messages))
    assert shown(PLAIN.render(conversation)) == "{1}[a cat\n]"


def test_plain_has_the_bos_only_of_a_tokenizer_that_prepends_it(tokenizer: Callable[..., Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    llama = tokenizer(**LLAMA_TOKENS)
    pair = talk(("user", "x"), ("assistant", "a cat"))
    assert shown(PLAIN.for_tokenizer(llama).render(pair)) == "[a cat\n]"
    llama.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", llama.bos_token_id)]
    )
    assert shown(PLAIN.for_tokenizer(llama).render(pair)) == "<s>[a cat\n]"


def test_plain_refuses_a_second_answer_that_no_image_asks_for() -> None:
    with pytest.raises(DataError, match="'plain': a second answer with no image before it"):
        PLAIN.render(talk(*TALK))


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, INTERNLM2_TEMPLATE, LLAMA3_TEMPLATE, VICUNA, PLAIN])
@pytest.mark.parametrize(
    "turns",
    [[], [("user", "a"), ("user", "b")], [("assistant", "a"), ("user", "b")], [("user", "a"), ("system", "b")]],
)
def test_a_conversation_of_any_roles_renders(template: ChatTemplate, turns: list[tuple[Role, str]]) -> None:
    text = shown(template.render(talk(*turns), generation_prompt=True))
    for role, content in turns:
        assert content in text or (template is PLAIN and role != "assistant")


@pytest.mark.parametrize(("name", "told"), [("qwen3", 1), ("chatml", 0)])
def test_a_template_that_trains_the_last_answer_alone_says_so_once_a_run(
    name: str, told: int, tmp_path: Path, tiny_llm_path: Path, plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time the data is prepared, cached or not, and at no other binding."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n', "utf-8")
    dataset = Dataset(source=use("jsonl", path=str(file)), data_map="alpaca")
    config = Data(datasets=(dataset,), chat_template=name, max_length=99)
    words = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))
    for _ in range(2):
        reported: list[str] = []
        prepare(config, plugins, words, tmp_path / "cache", reported.append)
        assert sum("only the last answer is trained" in line for line in reported) == told
    stream = SampleStream(config.model_copy(update={"streaming": True}), plugins, words, seed=1)
    feed = StreamFeed(stream, Account(tmp_path / "dropped.jsonl", 0.0, print))
    assert feed.summary().count("only the last answer is trained") == told
    assert not caplog.records

"""XTuner's names, each compared with its model's own format, written out by hand. `[[...]]` is what is trained."""

import logging
import pickle
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mmft.data.tokenize import Tokenizer, tokenize
from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft.specs import ChatTemplate
from mmft.testing import check_chat_template, tiny_tokenizer
from mmft.types import Conversation, Image, Message, Role, Segment, Text, ToolCall
from mmft_plugins.xtuner_templates import formats, mmft_chat_templates

OFFERED = {template.name: template for template in mmft_chat_templates()}
FORMS = {form.name: form for form in formats()}
XTUNER_NAMES = (
    "default", "zephyr", "internlm_chat", "internlm2_chat", "moss_sft", "llama2_chat", "code_llama_chat",
    "chatglm2", "chatglm3", "qwen_chat", "baichuan_chat", "baichuan2_chat", "wizardlm", "wizardcoder", "vicuna",
    "deepseek_coder", "deepseekcoder", "deepseek_moe", "deepseek_v2", "mistral", "mixtral", "minicpm", "minicpm3",
    "gemma", "cohere_chat", "llama3_chat", "phi3_chat",
)  # fmt: skip
ELSEWHERE = {"internlm2_chat", "vicuna", "llama3_chat"}

LLAMA2 = (
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST][[ Hello </s>]]<s>[INST] Bye [/INST][[ Ciao </s>]]"
    "<s>[INST] Well? [/INST]"
)
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[[Hello<|im_end|>]]\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[Ciao<|im_end|>]]\n"
    "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n"
)
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Hi\n\nAssistant:[[ Hello<｜end▁of▁sentence｜>]]"
    "User: Bye\n\nAssistant:[[ Ciao<｜end▁of▁sentence｜>]]User: Well?\n\nAssistant:"
)
DEEPSEEK_CODER = (
    "<｜begin▁of▁sentence｜>Be brief.\n### Instruction:\nHi\n### Response:[[\nHello\n<|EOT|>]]\n"
    "### Instruction:\nBye\n### Response:[[\nCiao\n<|EOT|>]]\n### Instruction:\nWell?\n### Response:"
)
MISTRAL = "<s> [INST] Be brief.\n\nHi [/INST][[ Hello</s>]] [INST] Bye [/INST][[ Ciao</s>]] [INST] Well? [/INST]"
EXPECTED = {
    "default": "<|System|>:Be brief.\n<|User|>:Hi\n<|Bot|>:[[Hello</s>]]\n<|User|>:Bye\n<|Bot|>:[[Ciao</s>]]\n"
    "<|User|>:Well?\n<|Bot|>:",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n[[Hello</s>]]\n"
    "<|user|>\nBye</s>\n<|assistant|>\n[[Ciao</s>]]\n<|user|>\nWell?</s>\n<|assistant|>\n",
    "internlm_chat": "<s><|System|>:Be brief.\n<|User|>:Hi<eoh>\n<|Bot|>:[[Hello<eoa>]]\n"
    "<|User|>:Bye<eoh>\n<|Bot|>:[[Ciao<eoa>]]\n<|User|>:Well?<eoh>\n<|Bot|>:",
    "moss_sft": "Be brief.\n<|Human|>: Hi<eoh>\n[[<|MOSS|>: Hello<eom>]]\n"
    "<|Human|>: Bye<eoh>\n[[<|MOSS|>: Ciao<eom>]]\n"
    "<|Human|>: Well?<eoh>\n",
    "llama2_chat": LLAMA2,
    "code_llama_chat": LLAMA2,
    "chatglm2": "[gMASK]sopBe brief.\n[Round 1]\n\n问：Hi\n\n答：[[Hello</s>]]\n\n"
    "[Round 2]\n\n问：Bye\n\n答：[[Ciao</s>]]\n\n"
    "[Round 3]\n\n问：Well?\n\n答：",
    "chatglm3": "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>[[\n Hello</s>]]"
    "<|user|>\n Bye<|assistant|>[[\n Ciao</s>]]<|user|>\n Well?<|assistant|>",
    "qwen_chat": CHATML,
    "baichuan_chat": "Be brief.<reserved_102>Hi<reserved_103>[[Hello</s>]]<reserved_102>Bye<reserved_103>[[Ciao</s>]]"
    "<reserved_102>Well?<reserved_103>",
    "baichuan2_chat": "Be brief.<reserved_106>Hi<reserved_107>[[Hello</s>]]<reserved_106>Bye<reserved_107>[[Ciao</s>]]"
    "<reserved_106>Well?<reserved_107>",
    "wizardlm": "<s>Be brief. USER: Hi ASSISTANT:[[ Hello</s>]]USER: Bye ASSISTANT:[[ Ciao</s>]]USER: Well? ASSISTANT:",
    "wizardcoder": "Be brief.\n\n### Instruction:\nHi\n\n### Response:[[Hello<|endoftext|>]]\n\n"
    "### Instruction:\nBye\n\n### Response:[[Ciao<|endoftext|>]]\n\n### Instruction:\nWell?\n\n### Response:",
    "deepseek_coder": DEEPSEEK_CODER,
    "deepseekcoder": DEEPSEEK_CODER,
    "deepseek_moe": DEEPSEEK,
    "deepseek_v2": DEEPSEEK,
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "minicpm": "<s>Be brief.<用户>Hi<AI>[[Hello</s>]]<用户>Bye<AI>[[Ciao</s>]]<用户>Well?<AI>",
    "minicpm3": CHATML,
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n[[Hello<end_of_turn>]]\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n[[Ciao<end_of_turn>]]\n"
    "<start_of_turn>user\nWell?<end_of_turn>\n<start_of_turn>model\n",
    "cohere_chat": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>[[Hello<|END_OF_TURN_TOKEN|>]]"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>[[Ciao<|END_OF_TURN_TOKEN|>]]"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Well?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "phi3_chat": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n[[Hello<|end|>]]\n"
    "<|user|>\nBye<|end|>\n<|assistant|>\n[[Ciao<|end|>]]\n<|user|>\nWell?<|end|>\n<|assistant|>\n",
}


def talk(*turns: tuple[Role, str], **options: Any) -> Conversation:
    return Conversation(tuple(Message(role, (Text(text),)) for role, text in turns), **options)


TWO_TURNS = (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao"))
TALK = talk(("system", "Be brief."), *TWO_TURNS)  # type: ignore[arg-type]
ASKED = talk(*((m.role, m.text) for m in TALK.messages), ("user", "Well?"))


def shown(segments: Any) -> str:
    """The text, `[[...]]` around what is trained and `{source}` for an image."""
    text = ""
    for loss, run in groupby(segments, key=lambda segment: segment.loss):
        inner = "".join(f"{{{s.content.source}}}" if isinstance(s.content, Image) else s.content for s in run)
        text += f"[[{inner}]]" if loss else inner
    return text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[..., Any]:
    def tokenizer(**options: Any) -> Any:
        return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer", **options))

    return tokenizer


@pytest.fixture(params=sorted(OFFERED))
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return OFFERED[request.param]


def test_every_xtuner_name_is_offered_once() -> None:
    """A user who comes from XTuner finds all 27 names, none of them ambiguous."""
    catalog = load_plugins().chat_templates
    assert len(XTUNER_NAMES) == 27 and set(OFFERED) == set(XTUNER_NAMES) - ELSEWHERE == set(EXPECTED)
    assert {name: len(catalog.owners(name)) for name in XTUNER_NAMES} == dict.fromkeys(XTUNER_NAMES, 1)


def test_the_published_check_passes_and_the_source_is_named(template: ChatTemplate) -> None:
    check_chat_template(template)
    assert template.source.startswith("https://") and template.stop


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_talk_of_two_turns_and_a_question_is_written_as_the_model_has_it(name: str) -> None:
    assert shown(OFFERED[name].render(ASKED, generation_prompt=True)) == EXPECTED[name]


def test_without_a_system_text_none_is_made_up(template: ChatTemplate) -> None:
    """Only the words of the format and of the data are written; no default prompt."""
    text = shown(template.render(talk(*TWO_TURNS), generation_prompt=False))  # type: ignore[arg-type]
    assert not {"brief", "System", "system", "SYS", "SYSTEM_TOKEN"} & set(
        text.replace("<|", " ").replace("|>", " ").split()
    )
    assert "helpful" not in text and "below" not in text.lower()


def test_bos_is_written_once_or_with_each_question_where_the_model_has_it_so(template: ChatTemplate) -> None:
    bos = FORMS[template.name].bos if template.name in FORMS else ""
    rendered = shown(template.render(ASKED))
    if not bos:
        assert not rendered.startswith(("<s>", "<bos>"))
    elif template.name in ("llama2_chat", "code_llama_chat"):
        assert rendered.count(bos) == 3
    else:
        assert rendered.startswith(bos) and rendered.count(bos) == 1


def test_every_answer_is_trained_with_its_end_and_an_untrained_one_is_not(template: ChatTemplate) -> None:
    trained = [s.content for s in template.render(TALK) if s.loss]
    assert sum(template.stop[0] in str(content) for content in trained) == 2
    muted = Conversation((*TALK.messages[:2], Message("assistant", (Text("Hello"),), loss=False), *TALK.messages[3:]))
    rendered = template.render(muted)
    assert "".join(str(s.content) for s in rendered) == "".join(str(s.content) for s in template.render(TALK))
    assert [s.content for s in rendered if s.loss and not s.markup] == ["Ciao"]


def test_tools_are_refused_with_a_way_out(template: ChatTemplate) -> None:
    if template.name == "moss_sft":  # it has tools: test_tools_protocols.py
        assert template.supports_tools
        return
    call = Message("assistant", tool_calls=(ToolCall("f", {}),))
    asked, result = Message("user", (Text("Hi"),)), Message("tool", (Text("1"),))
    for conversation in (
        Conversation((asked,), tools=({"name": "f"},)),
        Conversation((asked, call)),
        Conversation((asked, result)),
    ):
        with pytest.raises(DataError, match=f"'{template.name}' has no form for tools.*choose 'chatml', or 'auto'"):
            template.render(conversation)
    assert not template.supports_tools


def test_bos_and_eos_are_those_of_the_tokenizer(tokenizer: Callable[..., Any]) -> None:
    own = tokenizer(special=("<unk>", "<s>", "</s>", "<eos>"), bos="<s>", eos="<eos>")
    bound = OFFERED["mistral"].for_tokenizer(own)
    assert shown(bound.render(TALK)) == (
        "<s> [INST] Be brief.\n\nHi [/INST][[ Hello<eos>]] [INST] Bye [/INST][[ Ciao<eos>]]"
    )
    assert bound.stop == ("<eos>",)
    assert pickle.loads(pickle.dumps(bound)).render(TALK) == bound.render(TALK)


def test_another_familys_bos_is_not_written_unless_the_tokenizer_writes_it(tokenizer: Callable[..., Any]) -> None:
    """SmolLM2 calls `<|im_start|>` its BOS and never begins a text with it."""
    foreign = tokenizer(bos="<|im_start|>")
    assert shown(OFFERED["mistral"].for_tokenizer(foreign).render(TALK)).startswith(" [INST] Be brief.")


def test_the_tokenizers_eos_stops_beside_the_formats_own_end(tokenizer: Callable[..., Any]) -> None:
    bound = OFFERED["phi3_chat"].for_tokenizer(tokenizer(eos="<|endoftext|>"))
    assert bound.stop == ("<|end|>", "<|endoftext|>")
    assert OFFERED["gemma"].for_tokenizer(tokenizer()).stop == ("<end_of_turn>", "<|im_end|>")


def test_a_tokenizer_without_eos_is_refused_where_the_format_needs_one(tokenizer: Callable[..., Any]) -> None:
    bare = tokenizer()
    bare.eos_token = None
    with pytest.raises(DataError, match=r"'zephyr': the tokenizer has no end-of-sequence token.*give it one"):
        OFFERED["zephyr"].for_tokenizer(bare)
    assert OFFERED["qwen_chat"].for_tokenizer(bare).stop == ("<|im_end|>", "<|endoftext|>")


def test_missing_control_tokens_are_named(tokenizer: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    chatml = tokenizer()
    with caplog.at_level(logging.WARNING, "mmft"):
        OFFERED["qwen_chat"].for_tokenizer(chatml)
        OFFERED["default"].for_tokenizer(chatml)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "mmft"):
        OFFERED["gemma"].for_tokenizer(chatml)
    (record,) = caplog.records
    assert record.getMessage() == (
        "chat template 'gemma': the tokenizer has no token for <start_of_turn>, <end_of_turn> and spells it as text; "
        "take the model's own template ('auto') or one whose tokens it has"
    )


@pytest.mark.parametrize("name", ["llama2_chat", "mistral", "gemma"])
def test_a_merged_system_text_is_never_lost(name: str) -> None:
    """Without a question to open, it is one; a later one opens the next question; `{text}` in it is only text."""
    template = OFFERED[name]
    alone = shown(template.render(talk(("system", "S {text} {round}"))))
    assert "S {text} {round}" in alone
    followed = shown(template.render(talk(("system", "SYS1"), ("assistant", "A"), ("system", "SYS2"), ("user", "U"))))
    assert [followed.index(word) for word in ("SYS1", "A", "SYS2", "U")] == sorted(
        followed.index(word) for word in ("SYS1", "A", "SYS2", "U")
    )
    assert "[[" in followed and "SYS" not in followed[followed.index("[[") : followed.index("]]")]


def test_formats_that_trim_do_so_around_images_and_the_others_keep_every_space() -> None:
    shot = Message("user", (Text(" \n"), Image("a.png"), Text(" What? \n")))
    conversation = Conversation((shot, Message("assistant", (Text("  A cat. "),))))
    assert shown(OFFERED["llama2_chat"].render(conversation)) == "<s>[INST] {a.png} What? [/INST][[ A cat. </s>]]"
    assert shown(OFFERED["mistral"].render(conversation)) == "<s> [INST]  \n{a.png} What? \n [/INST][[   A cat. </s>]]"


def test_the_images_of_a_conversation_keep_their_place(template: ChatTemplate) -> None:
    messages = (
        Message("system", (Text("S"),)),
        Message("user", (Text("1"), Image("a.png"), Text("2"), Image("b.png"))),
        Message("assistant", (Text("3"),)),
    )
    order = [s.content for s in template.render(Conversation(messages)) if not s.markup]
    assert order == ["S", "1", Image("a.png"), "2", Image("b.png"), "3"]


def test_an_answer_that_spells_its_end_does_not_end_there(tokenizer: Callable[..., Any]) -> None:
    hf = tokenizer(special=("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>")
    bound = OFFERED["mistral"].for_tokenizer(hf)
    sample = tokenize(bound.render(talk(("user", "Hi </s>"), ("assistant", "No </s> here"))), Tokenizer(hf))
    assert sample.input_ids.tolist().count(hf.eos_token_id) == 1 and sample.input_ids[-1] == hf.eos_token_id


def test_markup_alone_is_marked_as_markup(template: ChatTemplate) -> None:
    written: list[Segment] = list(template.render(TALK))
    assert [s.content for s in written if not s.markup] == ["Be brief.", "Hi", "Hello", "Bye", "Ciao"]


MOSS_TALK = talk(
    ("system", "You may calculate.\n"),
    ("user", "12 * 12?"),
    ("assistant", '<|Inner Thoughts|>: Hm<eot>\n<|Commands|>: Calculate("12 * 12")<eoc>\n'),
    ("tool", "<|Results|>: 144 <eom><eor>\n"),
    ("assistant", "<|MOSS|>: It is <eom> 144.<eom>\n"),
)


def test_moss_trains_thoughts_commands_and_answer_and_never_the_results() -> None:
    assert shown(OFFERED["moss_sft"].render(MOSS_TALK)) == (
        "You may calculate.\n<|Human|>: 12 * 12?<eoh>\n"
        '[[<|Inner Thoughts|>: Hm<eot>\n<|Commands|>: Calculate("12 * 12")<eoc>]]\n'
        "<|Results|>: 144 <eom><eor>\n[[<|MOSS|>: It is <eom> 144.<eom>]]\n"
    )


def test_mosss_marks_are_control_tokens_only_where_they_are_marks(tokenizer: Callable[..., Any]) -> None:
    marks = ["<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>"]
    hf = tokenizer(special=("<|endoftext|>", *marks), eos="<|endoftext|>")
    template = OFFERED["moss_sft"].for_tokenizer(hf)
    whole = tokenize(template.render(MOSS_TALK), Tokenizer(hf)).input_ids.tolist()
    assert [token for token in hf.convert_ids_to_tokens(whole) if token in marks] == marks
    for k in (2, 4):
        prompt = template.render(Conversation(MOSS_TALK.messages[:k]), generation_prompt=True)
        ids = tokenize(prompt, Tokenizer(hf)).input_ids.tolist()
        assert ids == whole[: len(ids)]


def test_results_without_mosss_marks_are_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"messages\[1\] of role 'tool' is not MOSS's '<\|Results.*data map 'moss_sft'"):
        OFFERED["moss_sft"].render(talk(("user", "Q"), ("tool", "144")))

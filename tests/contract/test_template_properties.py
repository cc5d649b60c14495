"""What holds for every registered chat template, tried on random conversations.

Each template is bound to two tiny tokenizers: `family` has every control token that any registered template writes,
`foreign` has ChatML's alone and no BOS, so that most formats are spelled as text there. A template that is added, here
or by a plugin installed beside mmft, is found through `load_plugins()`.
"""

import re
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmft.data.tokenize import Tokenizer, tokenize_batch
from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft.specs import ChatTemplate
from mmft.testing import BATTERY, tiny_tokenizer
from mmft.types import Conversation, Image, Message, Text, TokenizedSample, ToolCall

PLUGINS = load_plugins()
NAMES = PLUGINS.chat_templates.names()
TOOL_NAMES = [spec.name for spec in PLUGINS.chat_templates if spec.supports_tools]
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WRITTEN = re.compile(r"<[|｜]?[^<>\s]+[|｜]?>|\[/?\w+\]")  # how formats spell their control tokens
TOOL = {"type": "function", "function": {"name": "search", "description": "", "parameters": {"type": "object"}}}
SECRET = "T00L-0UTPUT"
CALLED = Conversation(
    (
        Message("user", (Text("Q"),)),
        Message("assistant", (), (ToolCall("search", {}, "abcdefghi"),)),
        Message("tool", (Text(SECRET),), call_id="abcdefghi"),
    ),
    tools=(TOOL,),
)
LEADS = ("moss_sft", "qwen3")  # the model writes a mark, or its empty thoughts, before the answer
ONE_CALL = ("llama3_1", "llama3_2", "glm4")  # their models write one call a turn


def written_tokens() -> tuple[str, ...]:
    """Every control token that a template writes, found in what it renders, and GLM's that looks like a word.

    Less the tags of thoughts, which Qwen3 and DeepSeek V3.1 look for in what an answer says.
    """
    markup = [
        str(segment.content)
        for spec in PLUGINS.chat_templates
        if spec.name != "auto"
        for talk in (suited(spec.name, BATTERY[1]), *((CALLED,) if spec.supports_tools else ()))
        for segment in spec.render(talk, generation_prompt=True)
        if segment.markup
    ]
    found = {token for text in markup for token in WRITTEN.findall(text)}
    stops = {stop for spec in PLUGINS.chat_templates for stop in spec.stop if WRITTEN.fullmatch(stop)}
    return tuple(sorted({*found, *stops, *CHATML_TOKENS, "<s>", "</s>", "sop"} - {"<think>", "</think>"}))


def suited(name: str, conversation: Conversation) -> Conversation:
    """The conversation; for `plain`, which leaves questions out, with an image in every question."""
    if name != "plain":
        return conversation
    shown = Image("shown.png")
    messages = (Message(m.role, (shown, *m.parts)) if m.role == "user" else m for m in conversation.messages)
    return Conversation(tuple(messages))


CONTROL = written_tokens()
PIECES = (
    *CONTROL, "a", "Hello", " ", "  ", "\n", "\n\n", "\r\n", "\t", "你好", "é", "🙂", "\u200d", "\x00", ":", "0",
    "{text}", "{eos}", "{{ bos_token }}", "USER:", "[INST]", "<<SYS>>", "<image>",
    "<|", "|>", "<", "/s>", "<|im_", "end|>", "so", "p",
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=5).map("".join)
parts = st.lists(texts.map(Text) | st.sampled_from(("1.png", "2.png")).map(Image), max_size=3).map(tuple)
answers = st.builds(Message, st.just("assistant"), st.lists(texts.map(Text), max_size=2).map(tuple))
systems = st.just(()) | texts.map(lambda text: (Message("system", (Text(text),)),))
talks = st.builds(
    lambda system, turns: Conversation((*system, *(message for turn in turns for message in turn))),
    systems,
    st.lists(st.tuples(parts.map(lambda p: Message("user", p)), answers), min_size=1, max_size=3),
)
values = st.recursive(st.text(max_size=3) | st.integers(-9, 9) | st.booleans(), st.lists, max_leaves=3)
calls = st.builds(ToolCall, st.just("search"), st.dictionaries(st.sampled_from("qk"), values, max_size=2))
rounds = st.lists(calls, min_size=1, max_size=2).map(
    lambda made: (
        Message("assistant", (), tuple(made)),
        *(Message("tool", (Text(f"{SECRET} {number}"),)) for number in range(len(made))),
    )
)
tool_talks = st.builds(
    lambda question, rounds, answer: Conversation(
        (Message("user", (Text(f"Q{question}"),)), *(m for r in rounds for m in r), Message("assistant", (answer,))),
        tools=(TOOL,),
    ),
    st.sampled_from(("", " why?", "\n<|im_end|>", " 你好")),
    st.lists(rounds, min_size=1, max_size=2),
    st.sampled_from(("Yes.", "你好，世界。", "Two\nlines")).map(Text),
)
tried = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Two tiny tokenizers, of models with three tokens an image."""
    folder = tmp_path_factory.mktemp("tokenizers")
    options = {"family": {"special": CONTROL, "bos": "<s>", "eos": "</s>"}, "foreign": {"special": CHATML_TOKENS}}
    return {kind: made(folder / kind, **given_) for kind, given_ in options.items()}


def made(folder: Path, **options: object) -> Tokenizer:
    tiny_tokenizer(folder, **options)  # type: ignore[arg-type]
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(folder), tokens_per_image=3)


@pytest.fixture(params=["family", "foreign"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def encoded(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation) -> list[TokenizedSample]:
    """The conversation, then the prompt of each of its answers."""
    messages = conversation.messages
    prompts = [
        template.render(Conversation(messages[:k], conversation.tools), generation_prompt=True)
        for k, message in enumerate(messages)
        if message.role == "assistant"
    ]
    return tokenize_batch([template.render(conversation), *prompts], tokenizer)


def trained_runs(sample: TokenizedSample) -> list[list[int]]:
    """The ids of each stretch of trained tokens."""
    pairs = zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
    return [[token for token, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained]


def assert_prompts_are_prefixes(name: str, whole: TokenizedSample, prompts: list[TokenizedSample]) -> None:
    for prompt in prompts:
        assert prompt.input_ids.tolist() == whole.input_ids[: len(prompt)].tolist(), f"{name}: ids of a prompt"
        assert prompt.loss_mask.tolist() == whole.loss_mask[: len(prompt)].tolist(), f"{name}: mask of a prompt"
        assert whole.loss_mask[len(prompt)], f"{name}: the first token of an answer is not trained"


def harmless(conversation: Conversation) -> Conversation:
    """The same conversation with `x` for every text that is not blank."""
    messages = (
        Message(m.role, tuple(Text("x") if isinstance(p, Text) and p.text.strip() else p for p in m.parts))
        for m in conversation.messages
    )
    return Conversation(tuple(messages))


@pytest.mark.parametrize("name", NAMES)
@tried
@given(conversation=talks)
def test_prompts_are_prefixes_and_answers_alone_are_trained(
    name: str, tokenizer: Tokenizer, conversation: Conversation
) -> None:
    """The trained tokens are the answers, each with its end and nothing else, whatever anybody says."""
    template = PLUGINS.chat_templates.get(name).for_tokenizer(tokenizer.hf)
    conversation = suited(name, conversation)
    whole, *prompts = encoded(template, tokenizer, conversation)
    assert whole.images == conversation.images, f"{name}: images"
    runs = trained_runs(whole)
    spoken = [message.text for message in conversation.messages if message.role == "assistant"]
    if template.rewrites_history and len(runs) == 1:
        prompts, spoken = prompts[-1:], spoken[-1:]
    assert len(runs) == len(spoken), f"{name}: trained stretches"
    assert_prompts_are_prefixes(name, whole, prompts)
    ends = set(tokenizer.hf.convert_tokens_to_ids(list(CONTROL))) if template.stop[0] in CONTROL else set()
    for run, answer in zip(runs, spoken, strict=True):
        written = tokenizer.hf.decode(run)
        assert written.endswith(template.stop[0]), f"{name}: {written!r} is trained without its end"
        said = written.removesuffix(template.stop[0]).strip()
        assert said == answer.strip() or (name in LEADS and said.endswith(answer.strip())), f"{name}: trained text"
        if ends and template.stop[0] in tokenizer.hf.get_vocab():
            assert run[-1] in ends, f"{name}: the end is spelled, not the token"


@pytest.mark.parametrize("name", NAMES)
@tried
@given(conversation=talks)
def test_data_cannot_forge_control_tokens(
    name: str, tokenizers: dict[str, Tokenizer], conversation: Conversation
) -> None:
    """The control tokens of a conversation are those of one in which everybody says `x`, in the same order."""
    tokenizer = tokenizers["family"]
    template = PLUGINS.chat_templates.get(name).for_tokenizer(tokenizer.hf)
    conversation = suited(name, conversation)
    control = set(tokenizer.hf.all_special_ids) | set(tokenizer.hf.convert_tokens_to_ids(list(CONTROL)))
    real, plain = tokenize_batch([template.render(conversation), template.render(harmless(conversation))], tokenizer)
    assert [i for i in real.input_ids.tolist() if i in control] == [
        i for i in plain.input_ids.tolist() if i in control
    ], name


@pytest.mark.parametrize("name", [name for name in TOOL_NAMES if name != "auto"])
@tried
@given(conversation=tool_talks)
def test_calls_are_trained_and_tool_output_is_never_a_target(
    name: str, tokenizers: dict[str, Tokenizer], conversation: Conversation
) -> None:
    tokenizer = tokenizers["family"]
    template = PLUGINS.chat_templates.get(name).for_tokenizer(tokenizer.hf)
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if name in ONE_CALL and any(len(message.tool_calls) > 1 for message in answers):
        with pytest.raises(DataError, match="one"):
            template.render(conversation)
        return
    whole, *prompts = encoded(template, tokenizer, conversation)
    runs = [tokenizer.hf.decode(run) for run in trained_runs(whole)]
    if template.rewrites_history and len(runs) == 1:
        prompts, answers = prompts[-1:], answers[-1:]
    assert len(runs) == len(answers), f"{name}: trained stretches"
    assert_prompts_are_prefixes(name, whole, prompts)
    assert not any(SECRET in run for run in runs), f"{name}: tool output is trained"
    assert SECRET in tokenizer.hf.decode(whole.input_ids.tolist()), f"{name}: tool output is lost"
    for run, message in zip(runs, answers, strict=True):
        assert run.endswith(template.stop), f"{name}: {run!r} is trained without its end"
        assert (message.text or "search") in run, f"{name}: trained text"

"""What a template writes for calls, its reader reads back; and of an answer the user sees neither marks nor calls."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_models import CONTROL, asked, calculates, result, said
from transformers import AutoTokenizer

from mmft.chat.tools import CallReader
from mmft.errors import PluginError
from mmft.generation import Mark, Writer
from mmft.plugins import load_plugins
from mmft.specs import ChatTemplate
from mmft.testing import CHATML, check_chat_template, tiny_tokenizer
from mmft.types import Conversation, ToolCall
from mmft_plugins._react import read_react
from mmft_plugins.templates import AUTO

ORACLE = Path(__file__).parents[1] / "oracle" / "jinja"
PLUGINS = load_plugins()
READING = [template for template in PLUGINS.chat_templates if template.read_calls]
SCHEMA = {"type": "function", "function": {"name": "search", "description": "D", "parameters": {"type": "object"}}}
# One call a turn and no text beside it; ids of nine letters, and no text beside calls.
ALONE, WITH_IDS = ("llama3_1", "llama3_2", "glm4"), ("mistral_v2", "mistral_v3", "mistral_nemo")
OWN = {  # file in the oracle's folder: control tokens, BOS, EOS
    "qwen2_5": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "qwen3": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "granite": (("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), None, "<|end_of_text|>"),
    "llama3_1": (CONTROL, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral_v3": (CONTROL, "<s>", "</s>"),
    "mistral_nemo": (CONTROL, "<s>", "</s>"),
}
texts = st.text(max_size=8) | st.sampled_from(
    ("</tool_call>", "<tool_call>", '"}', "[TOOL_CALLS]", "Action: x\nAction Input: {}", "<eoc>", "\\", "你好", "a\nb")
)
values = st.recursive(
    texts | st.integers(-9, 9) | st.booleans() | st.none() | st.floats(-9, 9), lambda v: st.lists(v) | st.dictionaries(
        st.sampled_from("ab"), v), max_leaves=4,
)  # fmt: skip
arguments = st.dictionaries(st.sampled_from(("q", "expression", "n")), values, max_size=3)
names = st.sampled_from(("search", "calculate", "get_weather2"))
calls = st.lists(st.builds(ToolCall, names, arguments), min_size=1, max_size=3).map(tuple)
tried = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def written(template: ChatTemplate, made: Sequence[ToolCall], beside: str = "") -> str:
    """What a model would have to write, less what ends it: the trained part of the answer."""
    talk = Conversation((asked("Q"), said(beside, *made)), (SCHEMA,))
    text = "".join(str(segment.content) for segment in template.render(talk) if segment.loss)
    return min((text.removesuffix(stop) for stop in template.stop), key=len)


@pytest.mark.parametrize("template", READING, ids=lambda template: template.name)
@tried
@given(made=calls, beside=st.sampled_from(("", "I look.", "两\n行")))
def test_what_a_template_writes_for_calls_is_read_back(
    template: ChatTemplate, made: tuple[ToolCall, ...], beside: str
) -> None:
    if template.name in ALONE:
        made, beside = made[:1], ""
    if template.name in WITH_IDS:
        made, beside = tuple(replace(call, id=f"abcdefgh{n}") for n, call in enumerate(made)), ""
    assert template.read_calls is not None
    text = written(template, made, beside)
    said_, found = template.read_calls(text)
    assert found == made
    assert written(template, found, said_) == text, "the history is not what the model wrote"
    assert any(mark in text for mark in template.call_marks), "nothing would be hidden"


def test_a_template_that_cannot_read_its_own_calls_is_found_out() -> None:
    template = PLUGINS.chat_templates.get("chatml")
    check_chat_template(template)
    with pytest.raises(PluginError, match=r"chat template 'chatml': of the call it wrote as .* it reads back"):
        check_chat_template(replace(template, read_calls=PLUGINS.chat_templates.get("llama3_1").read_calls))
    with pytest.raises(PluginError, match="none of its call_marks is in a call"):
        check_chat_template(replace(template, call_marks=("[TOOL_CALLS]",)))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ChatTemplate]:
    """`auto` for a tokenizer with a jinja template, given or from the oracle's folder."""

    def own(name: str, jinja: str = "") -> ChatTemplate:
        special, bos, eos = OWN.get(name, (CONTROL, "<s>", "<|im_end|>"))
        text = jinja or (ORACLE / f"{name}.jinja").read_text("utf-8")
        folder = tiny_tokenizer(tmp_path_factory.mktemp(name), chat_template=text, special=special, bos=bos, eos=eos)
        return AUTO.for_tokenizer(AutoTokenizer.from_pretrained(folder))

    return own


HARD = (
    ToolCall("get_weather2", {"city": 'Par"is}', "deep": {"a": [1, None]}}),
    ToolCall("calculate", {"expression": "1 < 2 & 3 '"}),
)


@pytest.mark.parametrize("name", OWN)
def test_auto_reads_the_calls_of_a_models_own_template(name: str, own: Callable[..., ChatTemplate]) -> None:
    """Found by rendering, in whatever form: no name of a model is looked at."""
    template = own(name)
    assert template.read_calls is not None
    made = HARD[:1] if name in ALONE else HARD
    if name.startswith("mistral"):
        made = tuple(replace(call, id=f"abcdefgh{n}") for n, call in enumerate(made))
    text = written(template, made)
    assert template.read_calls(text)[1] == made
    assert any(text.startswith(mark) or mark in text[:40] for mark in template.call_marks)
    assert template.read_calls("It is 144.") == ("It is 144.", ())
    assert pickle.loads(pickle.dumps(template.read_calls))(text)[1] == made


def jinja_with(call: str, around: tuple[str, str] = ("", ""), join: str = "") -> str:
    """A ChatML template that knows tools and writes each call so."""
    body = (
        f"{{{{ '{around[0]}' }}}}{{% for call in message.tool_calls %}}{{% if not loop.first %}}{{{{ '{join}' }}}}"
        f"{{% endif %}}{{% set f = call.function %}}{call}{{% endfor %}}{{{{ '{around[1]}' }}}}"
    )
    return CHATML.replace("{% for", "{% if tools %}{{ tools | tojson }}{% endif %}{% for", 1).replace(
        "+ message['content'] + '<|im_end|>' + '\n' }}",
        f"+ message['content'] }}}}{{% if message.tool_calls %}}{body}{{% endif %}}{{{{ '<|im_end|>\n' }}}}",
    )


DEEPSEEK = "{{ '<CALL>function<SEP>' + f.name + '\n```json\n' + (f.arguments | tojson) + '\n```<END>' }}"
XML = "<function={{ f.name }}>{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</function>"


@pytest.mark.parametrize(
    ("jinja", "marks"),
    [
        (jinja_with(DEEPSEEK, ("<CALLS>", "</CALLS>"), "\n"), ("<CALLS>", "<CALL>")),
        (jinja_with("{{ '<|call|>' + f.name + (f.arguments | tojson) }}"), ("<|call|>",)),
        (jinja_with("{{ {'type': 'function', 'function': f} | tojson }}", ("[", "]"), ", "), ("[{",)),
    ],
)
def test_auto_reads_forms_that_no_shipped_template_has(
    jinja: str, marks: tuple[str, ...], own: Callable[..., ChatTemplate]
) -> None:
    template = own("invented", jinja)
    assert template.read_calls is not None
    for made in (HARD[:1], HARD):
        assert template.read_calls(written(template, made)) == ("", made)
        assert template.read_calls("I look.\n" + written(template, made)) == ("I look.", made)
    assert all(any(begin.startswith(mark) or mark in begin for begin in template.call_marks) for mark in marks[:1])


@pytest.mark.parametrize(
    "call",
    [XML, "{{ f | string }}", "{{ f.name + ' ' + (f.arguments | tojson | tojson) }}", "{{ f.arguments | tojson }}"],
)
def test_auto_says_so_where_calls_cannot_be_read_back(call: str, own: Callable[..., ChatTemplate]) -> None:
    template = own("unreadable", jinja_with(call))
    assert template.supports_tools and template.read_calls is None and template.call_marks == ()


@pytest.mark.parametrize("template", READING, ids=lambda template: template.name)
@pytest.mark.parametrize(
    "text",
    [
        "It is 144.", '{"name": "f"}', '{"a": 1}', "<tool_call> is a tag", "<tool_call>\n{broken", "[TOOL_CALLS] [",
        "{", '<tool_call>\n{"name": 5, "arguments": {}}', "[" * 3000, '{"a":' * 3000, "Action: f\nAction Input: no", "",
    ],
)  # fmt: skip
def test_what_is_no_call_is_shown(template: ChatTemplate, text: str) -> None:
    reader = CallReader(template)
    shown = "".join(reader.take(character) for character in text)
    rest, said_, made = reader.end()
    assert (shown + rest, said_, made) == (text, text, ())


def pieces_of(tokenizer: Any, text: str) -> list[str]:
    """What the writer sends for a text of a model, control tokens included."""
    sent: list[str] = []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    writer = Writer(tokenizer, [], (), sent.append, Event(), marks=True)
    for number in range(1, len(ids) + 1):
        writer(torch.tensor([ids[:number]]), torch.empty(0))
    writer.end()
    return sent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("marks"), special=CONTROL))


def test_control_tokens_are_marks_among_the_pieces_and_nothing_else_changes(tokenizer: Any) -> None:
    sent = pieces_of(tokenizer, "A 🦙[TOOL_CALLS] [1]<|im_start|>你好")
    assert "".join(sent) == "A 🦙[TOOL_CALLS] [1]<|im_start|>你好"
    assert [piece for piece in sent if isinstance(piece, Mark)] == ["[TOOL_CALLS]", "<|im_start|>"]


def test_half_a_character_before_a_control_token_is_sent_once(tokenizer: Any) -> None:
    half = tokenizer.encode("🦙", add_special_tokens=False)[:-1]
    ids = [*half, tokenizer.convert_tokens_to_ids("<eoc>"), *tokenizer.encode("A", add_special_tokens=False)]
    sent: list[str] = []
    writer = Writer(tokenizer, [], (), sent.append, Event(), marks=True)
    for number in range(1, len(ids) + 1):
        writer(torch.tensor([ids[:number]]), torch.empty(0))
    writer.end()
    assert sent[1:] == ["<eoc>", "A"] and set(sent[0]) == {"\ufffd"}


def test_a_spelled_control_token_is_no_mark(tokenizer: Any) -> None:
    ids = tokenizer.encode("[TOOL", add_special_tokens=False) + tokenizer.encode("_CALLS]", add_special_tokens=False)
    sent: list[str] = []
    writer = Writer(tokenizer, [], (), sent.append, Event(), marks=True)
    for number in range(1, len(ids) + 1):
        writer(torch.tensor([ids[:number]]), torch.empty(0))
    assert "".join(sent) == "[TOOL_CALLS]" and not any(isinstance(piece, Mark) for piece in sent)


def test_text_is_shown_as_it_comes_and_held_back_where_a_call_may_begin(tokenizer: Any) -> None:
    reader = CallReader(PLUGINS.chat_templates.get("chatml"))
    seen = [
        reader.take(piece) for piece in ("I ", "see <", "b>", "<|", Mark("<|im_start|>"), "<tool", "_call>\n{", "x")
    ]
    assert seen == ["I ", "see ", "<b>", "<|", "", "", "", ""]
    assert reader.end() == ("<tool_call>\n{x", "I see <b><|<tool_call>\n{x", ())


def test_no_control_token_is_shown_with_tools_either(tokenizer: Any) -> None:
    reader = CallReader(PLUGINS.chat_templates.get("mistral_v3"))
    shown = "".join(reader.take(piece) for piece in pieces_of(tokenizer, "A<|im_start|> cat.[TOOL_CALLS] nothing"))
    rest, said_, made = reader.end()
    assert (shown + rest, said_, made) == ("A cat. nothing", "A cat. nothing", ())


def test_llamas_python_tag_is_taken_off() -> None:
    read = PLUGINS.chat_templates.get("llama3_1").read_calls
    assert read is not None
    text = '<|python_tag|>{"name": "f", "parameters": {"a": 1}}<|eom_id|>'
    assert read(text) == ("", (ToolCall("f", {"a": 1}),))
    assert read('{"type": "function", "name": "f", "parameters": "{\\"a\\": 1}"}')[1] == (ToolCall("f", {"a": 1}),)
    assert read('Look: {"name": "f", "parameters": {}}')[1] == ()
    assert read('{"name": "f", "parameters": {}} is JSON')[1] == ()


def moss(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    read = PLUGINS.chat_templates.get("moss_sft").read_calls
    assert read is not None
    return read(text)


@pytest.mark.parametrize(
    ("commands", "found"),
    [
        ('Calculate("1 + 2")', [calculates("1 + 2")]),
        (
            'Calculator("1+2"), Search("a \\d \\"b\\"")',
            [calculates("1+2"), ToolCall("search", {"query": 'a \\d \\"b\\'})],
        ),
        ('Solve("x=1")<eoc>\nSearch("no")', [ToolCall("solve", {"equations": "x=1"})]),
        ('weather({"city": "Paris"})', [ToolCall("weather", {"city": "Paris"})]),
        ('weather("Paris")', [ToolCall("weather", {"input": "Paris"})]),
        ("None", [ToolCall("", {})]),
        ("Calculate(1 + 2)", [ToolCall("", {})]),
    ],
)
def test_mosss_commands_are_calls(commands: str, found: list[ToolCall]) -> None:
    thoughts = "<|Inner Thoughts|>: hm<eot>\n"
    said_, made = moss(f"{thoughts}<|Commands|>: {commands}")
    assert said_ == thoughts and len(made) == len(found)
    assert made[0] == found[0]


def test_mosss_answer_is_shown_without_its_marks() -> None:
    assert moss("<|MOSS|>: It is 3.") == ("It is 3.", ())


def rendered(name: str, *messages: Any, tools: Sequence[Any] = ()) -> str:
    template = PLUGINS.chat_templates.get(name)
    return "".join(
        str(s.content) for s in template.render(Conversation(messages, tuple(tools)), generation_prompt=True)
    )


def schema(name: str) -> dict[str, Any]:
    return PLUGINS.tools.get(name).schema


def test_moss_is_told_of_the_enabled_tools_alone() -> None:
    """XTuner meant to, and threw the changed text away."""
    system = PLUGINS.system_texts.get("moss_sft").text
    told = rendered("moss_sft", said_system(system), asked("Q"), tools=[schema("calculate")])
    assert "- Calculator: enabled. API: Calculate(expression)\n" in told
    assert "- Web search: disabled.\n" in told and "- Equation solver: disabled.\n" in told
    assert "- Text-to-image: disabled.\n" in told and "Search(query)" not in told
    bare = rendered("moss_sft", asked("Q"), tools=[schema("search"), SCHEMA | {"function": {"name": "f"}}])
    assert bare == (
        "What is available:\n- Inner thoughts: enabled.\n- Web search: enabled. API: Search(query)\n"
        "- f: enabled. API: f({})\n<|Human|>: Q<eoh>\n"
    )


def said_system(text: str) -> Any:
    return replace(asked(text), role="system")


def test_mosss_results_stand_with_their_calls() -> None:
    made = said("", calculates("1+2", "a"), calculates("2+2", "b"))
    text = rendered("moss_sft", asked("Q"), made, result("4", "b"), result("3", "a"))
    assert text == (
        "<|Human|>: Q<eoh>\n<|Inner Thoughts|>: None<eot>\n"
        '<|Commands|>: Calculate("1+2"), Calculate("2+2")<eoc>\n'
        '<|Results|>:\nCalculate("2+2") => 4\nCalculate("1+2") => 3\n<eor>\n'
    )


def test_react_writes_tools_as_text() -> None:
    text = rendered("react", asked("Q"), said("I add.", calculates("1+2")), result("3"), tools=[SCHEMA])
    assert 'search: D Arguments: {"type": "object"}' in text
    assert text.endswith(
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nThought: I add.\nAction: calculate\n"
        'Action Input: {"expression": "1+2"}<|im_end|>\n<|im_start|>user\nObservation: 3<|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_react_reads_what_models_write() -> None:
    text = 'Thought: I need it.\nAction: calculate\nAction Input:\n{\n  "expression": "1+2"\n}\n'
    assert read_react(text) == ("I need it.", (calculates("1+2"),))
    assert read_react("Thought: I know.\nFinal Answer: 3") == ("3", ())

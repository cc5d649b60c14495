"""Tools, calls and results have the token ids that the models' own jinja gives them.

Some models' own templates take them as transformers hands them over. Others take messages of a form of their own, or
leave the schemas to the system text; then the conversation is put into that form, as the model's makers describe it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from family_cases import INTERNLMS, MISTRALS, TEMPLATES, TOKENS, TOOL_FAMILIES, render, talk

from mmft.data.proof_cases import TOOL, as_messages
from mmft.errors import DataError
from mmft.types import Conversation, Message, Text, ToolCall
from mmft_plugins.templates import AUTO, CHATML_TEMPLATE


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "granite"])
def test_parallel_calls_with_a_text_beside_them_have_the_models_ids(name: str, load: Callable[..., Any]) -> None:
    hf = load(name)
    calls = (ToolCall("weather", {"city": "Paris"}), ToolCall("weather", {"city": "北京", "deep": {"a": [1]}}))
    call = Message("assistant", (Text("I look."),), calls)
    results = talk(("tool", "one"), ("tool", "two"), ("assistant", "Warm.")).messages
    conversation = Conversation((*talk(("system", "S"), ("user", "q")).messages, call, *results), (TOOL, TOOL))
    expected = hf.apply_chat_template(as_messages(conversation), tools=[TOOL, TOOL])["input_ids"]
    assert render(TEMPLATES[name], hf, conversation).input_ids.tolist() == expected


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


@pytest.mark.parametrize("name", [name for name in TOKENS if name not in TOOL_FAMILIES])
def test_a_family_without_tools_advises_what_works(name: str, load: Callable[..., Any]) -> None:
    """Not 'auto', which refuses its model's own template too, but ChatML."""
    hf, conversation = load(name), tool_talk((None, None))
    with pytest.raises(DataError, match="own template ignores tools too, so 'auto' refuses") as refused:
        render(TEMPLATES[name], hf, conversation)
    assert "choose 'chatml' with data.allow_template_difference" in str(refused.value)
    with pytest.raises(DataError, match="choose"):
        render(AUTO, hf, conversation)
    assert CHATML_TEMPLATE.render(conversation)


def in_own_form(name: str, conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as the models' makers write them for their own template, where it takes no OpenAI tools."""
    schemas = [dict(tool) for tool in conversation.tools]
    system, rest = (
        (c if (c := conversation.messages[:1]) and c[0].role == "system" else ()),
        list(conversation.messages),
    )
    text = rest.pop(0).text if system else ""
    own: list[dict[str, Any]] = []
    if name == "glm4":  # https://huggingface.co/THUDM/glm-4-9b-chat-hf: `tools` and `metadata` of a message
        own = [{"role": "system", "content": text, "tools": schemas}]
    elif name == "deepseek_v3_1":  # https://huggingface.co/deepseek-ai/DeepSeek-V3.1, README.md, ToolCall
        own = [{"role": "system", "content": f"{text}\n\n{DEEPSEEK_TOLD.format(*map(described, schemas))}"}]
    else:  # https://github.com/InternLM/InternLM/blob/1182cbb/chat/chat_format.md
        own = [{"role": "system", "content": text}] if system else []
        own += [{"role": "system name=<|plugin|>", "content": dumped([tool["function"] for tool in schemas])}]
    return own + [turn for message in rest for turn in turns_in_own_form(name, message)]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def described(tool: dict[str, Any]) -> str:
    name, description, schema = (tool["function"][key] for key in ("name", "description", "parameters"))
    return f"### {name}\nDescription: {description}\n\nParameters: {dumped(schema)}"


DEEPSEEK_TOLD = """## Tools
You have access to the following tools:

{}

{}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>\
{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""
ROLES = {"glm4": "observation", "deepseek_v3_1": "tool", **dict.fromkeys(INTERNLMS, "environment name=<|plugin|>")}


def turns_in_own_form(name: str, message: Message) -> list[dict[str, Any]]:
    role = ROLES[name] if message.role == "tool" else message.role
    calls = [(call.name, dict(call.arguments)) for call in message.tool_calls]
    if not calls:
        return [{"role": role, "content": message.text}]
    if name == "glm4":
        return [{"role": role, "metadata": made, "content": dumped(given)} for made, given in calls]
    if name == "deepseek_v3_1":
        written = [
            {"type": "function", "function": {"name": made, "arguments": dumped(given)}} for made, given in calls
        ]
        return [{"role": role, "content": message.text, "tool_calls": written}]
    acts = (dumped({"name": made, "parameters": given}) for made, given in calls)
    acted = "".join(f"<|action_start|><|plugin|>\n{act}<|action_end|>" for act in acts)
    return [{"role": role, "content": message.text + acted}]


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("system", [None, "Be kind.\n"])
def test_tools_have_the_ids_of_the_models_own_template_given_messages_of_its_own_form(
    name: str, system: str | None, load: Callable[..., Any]
) -> None:
    """Two rounds, two calls a turn and a text beside them where the format has a place for that; also as prompts."""
    hf = load(name)
    call, more = ToolCall("weather", {"city": "北京", "deep": {"a": [1, None]}}), ToolCall("weather", {})
    first = Message("assistant", (), (call,))
    second = first if name == "glm4" else Message("assistant", (Text("I look."),), (call, more))
    results = talk(*[("tool", '{"celsius": 21}'), ("tool", "cold")][: len(second.tool_calls)]).messages
    asked, said = talk(("user", "How warm?"), ("assistant", "It is 21.")).messages
    head = () if system is None else talk(("system", system)).messages
    turns = (*head, asked, first, results[0], second, *results, said, asked, first, results[0], said)
    conversation = Conversation(turns, (TOOL, {**TOOL, "function": {**TOOL["function"], "name": "天气"}}))
    found = render(TEMPLATES[name], hf, conversation)
    theirs = hf.apply_chat_template(in_own_form(name, conversation))["input_ids"]
    end = ["<|user|>"] if name == "glm4" else []
    assert hf.decode(found.input_ids) == hf.decode(theirs) + "".join(end)
    assert found.input_ids.tolist() == theirs + hf.convert_tokens_to_ids(end)
    trained = hf.decode(found.input_ids[found.loss_mask])
    assert trained.count("北京") == 3 and trained.count("It is 21.") == 2
    assert "celsius" not in trained and "cold" not in trained and "How warm?" not in trained
    for number, message in enumerate(turns):
        if message.role == "assistant":
            question = replace(conversation, messages=turns[:number])
            ours = render(TEMPLATES[name], hf, question, prompt=True).input_ids.tolist()
            own = hf.apply_chat_template(in_own_form(name, question), add_generation_prompt=True)["input_ids"]
            assert ours == own and not render(TEMPLATES[name], hf, question).loss_mask[-1]


def test_glm4_refuses_what_its_format_would_lose(load: Callable[..., Any]) -> None:
    hf = load("glm4")
    for parts, calls in ((), (ToolCall("f", {}), ToolCall("g", {}))), ((Text("I look."),), (ToolCall("f", {}),)):
        conversation = Conversation((*talk(("user", "q")).messages, Message("assistant", parts, calls)), (TOOL,))
        with pytest.raises(DataError, match="'glm4' takes one call a turn and no text beside it"):
            render(TEMPLATES["glm4"], hf, conversation)


def test_a_call_of_glm4_ends_with_the_token_that_opens_its_result(load: Callable[..., Any]) -> None:
    hf = load("glm4")
    turns = (*talk(("user", "q")).messages, Message("assistant", (), (ToolCall("f", {}),)))
    for after in ((), talk(("tool", "r"), ("assistant", "a")).messages):
        found = render(TEMPLATES["glm4"], hf, Conversation((*turns, *after), (TOOL,)))
        assert hf.decode(found.input_ids[found.loss_mask]).startswith("f\n{}<|observation|>")


KINDS = {  # of Command R's signatures; without a description its own template fails
    name: {**kind, "description": f"the {name}"}
    for name, kind in {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "share": {"type": "number"},
        "warm": {"type": "boolean"},
        "places": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object", "additionalProperties": {"type": "string"}},
        "either": {"type": ["string", "integer"]},
        "any": {},
    }.items()
}
WEATHER = {"name": "weather", "description": "天气", "parameters": {"properties": KINDS, "required": ["city"]}}
CLOCK = {"name": "clock", "description": "the time", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("system", [None, " Be kind.\n"])
def test_command_rs_tools_have_the_ids_of_its_own_template_for_tools(
    system: str | None, load: Callable[..., Any]
) -> None:
    """Its own template is one for prompts: an answer is trained after the prompt, and nothing else is."""
    hf = load("command_r", "command_r_tool_use")
    tools = tuple({"type": "function", "function": function} for function in (WEATHER, CLOCK))
    call, more = ToolCall("weather", {"city": "北京", "deep": {"a": [1, None]}}), ToolCall("clock", {})
    calls = Message("assistant", (Text(" I look. "),), (call, more))
    asked, one, two, said = talk(("user", " q "), ("tool", " warm "), ("tool", "late"), ("assistant", " A. ")).messages
    head = () if system is None else talk(("system", system)).messages
    turns = (*head, asked, calls, one, two, said, asked, Message("assistant", (), (more,)), two, said)
    for number in [n for n, message in enumerate(turns) if message.role == "assistant"]:
        question = Conversation(turns[:number], tools)
        prompt = render(TEMPLATES["command_r"], hf, question, prompt=True).input_ids.tolist()
        theirs = hf.apply_chat_template(as_messages(question), tools=list(tools), add_generation_prompt=True)
        assert hf.decode(prompt) == hf.decode(theirs["input_ids"])
        assert prompt == theirs["input_ids"]
        whole = render(TEMPLATES["command_r"], hf, Conversation(turns[: number + 1], tools))
        assert whole.input_ids[: len(prompt)].tolist() == prompt
        assert whole.loss_mask.tolist() == [at >= len(prompt) for at in range(len(whole))]
        answer = hf.decode(whole.input_ids[len(prompt) :]).removesuffix("<|END_OF_TURN_TOKEN|>")
        later = Conversation((*turns[: number + 1], asked), tools)
        assert answer in hf.apply_chat_template(as_messages(later), tools=list(tools), tokenize=False)

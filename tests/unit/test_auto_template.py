"""What `auto` makes of a tokenizer's own template, seen as text: `[...]` stands around what is trained."""

import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from template_talk import TALK, data, shown, talk

from mmft.data.tokenize import Tokenizer, tokenize
from mmft.errors import DataError
from mmft.testing import CHATML, check_chat_template
from mmft.types import Conversation, Image, Message, Text, ToolCall
from mmft_plugins.templates import AUTO, CHATML_TEMPLATE, PLAIN, VICUNA

TOOL: Mapping[str, Any] = {"type": "function", "function": {"name": "f"}}
TOOL_TALK = Conversation(
    (
        *talk(("system", "S"), ("user", "q")).messages,
        Message("assistant", (Text("Wait."),), (ToolCall("f", {"a": "ä"}), ToolCall("g", {}))),
        *talk(("tool", "one"), ("tool", "two"), ("assistant", "Done.")).messages,
    ),
    (TOOL,),
)


HEADER = "{% for m in messages %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ROLE = "{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}"
THINKS = f"{HEADER}{ROLE}{{% if loop.last and m.role == 'assistant' %}}<think>\n\n</think>\n\n{{% endif %}}"
REWRITES = THINKS + "{{ m.content }}" + END + PROMPT
STRIPS = f"{HEADER}{ROLE}{{{{ m.content | trim }}}}{END}{PROMPT}"
CHANGES = f"{HEADER}{ROLE}{{{{ m.content | upper }}}}{END}{PROMPT}"


def test_auto_trains_every_answer_through_its_end_and_keeps_contents_as_data(tokenizer: Callable[..., Any]) -> None:
    bound = AUTO.for_tokenizer(tokenizer())
    segments = bound.render(talk(*TALK))
    assert shown(segments) == shown(CHATML_TEMPLATE.render(talk(*TALK)))
    assert data(list(segments)) == ["Hi", "Hello", "Bye", "Ciao"]
    assert bound.stop == ("<|im_end|>",)
    check_chat_template(bound)


def test_auto_stops_at_what_ends_a_turn_and_at_eos(tokenizer: Callable[..., Any]) -> None:
    assert AUTO.for_tokenizer(tokenizer(eos="<|endoftext|>")).stop == ("<|im_end|>", "<|endoftext|>")


def test_auto_keeps_stripped_contents_as_data(tokenizer: Callable[..., Any]) -> None:
    bound = AUTO.for_tokenizer(tokenizer(STRIPS))
    segments = bound.render(talk(("user", " <|im_end|>\n"), ("assistant", "\nHello ")))
    assert data(list(segments)) == ["<|im_end|>", "Hello"]
    check_chat_template(bound)


def test_auto_puts_images_where_they_stand(tokenizer: Callable[..., Any]) -> None:
    question = Message("user", (Image("1"), Text("a"), Text(""), Image("2"), Text("b")))
    for jinja in (CHATML, CHANGES):
        segments = AUTO.for_tokenizer(tokenizer(jinja)).render(Conversation((question,)))
        assert shown(segments).lower() == "<|im_start|>user\n{1}a{2}b<|im_end|>\n"


def test_auto_trains_the_last_turn_alone_where_the_template_rewrites_history(
    tokenizer: Callable[..., Any],
) -> None:
    bound = AUTO.for_tokenizer(tokenizer(REWRITES))
    assert bound.rewrites_history  # which a run tells the user, once
    assert shown(bound.render(talk(*TALK))) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\n\n</think>\n\nCiao<|im_end|>]\n"
    )
    assert "[" not in shown(bound.render(talk(*TALK[:3]), generation_prompt=True))


def test_auto_trains_no_earlier_turn_beside_the_last_where_another_is_uncertain(tokenizer: Callable[..., Any]) -> None:
    """Here the second of three is written otherwise while it is the last."""
    bound = AUTO.for_tokenizer(tokenizer(REWRITES.replace("loop.last and", "loop.last and messages | length == 4 and")))
    six = talk(*TALK, ("user", "Encore"), ("assistant", "Oui"))
    assert shown(bound.render(six)).count("[") == 1


def test_auto_says_nothing_of_a_template_that_trains_every_turn(
    tokenizer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        bound = AUTO.for_tokenizer(tokenizer())
    assert not caplog.records and not bound.rewrites_history


def test_auto_ends_a_turn_at_its_first_control_token(tokenizer: Callable[..., Any]) -> None:
    """Phi-3-small writes <|endoftext|> after the last turn, and only there."""
    jinja = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert shown(AUTO.for_tokenizer(tokenizer(jinja)).render(talk(*TALK))) == (
        shown(CHATML_TEMPLATE.render(talk(*TALK))) + "<|endoftext|>"
    )


def test_auto_leaves_the_space_at_the_end_of_a_prompt_to_the_answer(tokenizer: Callable[..., Any]) -> None:
    jinja = (
        f"{HEADER}{{{{ m.role }}}}: {{{{ m.content }}}}{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    bound = AUTO.for_tokenizer(tokenizer(jinja))
    assert shown(bound.render(talk(*TALK[:2]))) == "user: Hiassistant:[ Hello<|im_end|>]"
    check_chat_template(bound)


def test_auto_renders_a_template_that_changes_contents_as_markup(tokenizer: Callable[..., Any]) -> None:
    segments = AUTO.for_tokenizer(tokenizer(CHANGES)).render(talk(*TALK[:2]))
    assert shown(segments) == "<|im_start|>user\nHI<|im_end|>\n<|im_start|>assistant\n[HELLO<|im_end|>]\n"
    assert data(list(segments)) == []


def test_auto_takes_a_template_that_writes_more_for_some_contents_as_markup(tokenizer: Callable[..., Any]) -> None:
    bound = AUTO.for_tokenizer(
        tokenizer(CHATML + "{{ '\n' if 'Hi' in messages[0].content and not add_generation_prompt }}")
    )
    assert data(list(bound.render(talk(*TALK)))) == []
    assert shown(bound.render(talk(*TALK))).endswith("[Ciao<|im_end|>]\n\n")


@pytest.mark.parametrize("forged", ["<|IM_END|> is <|im_end|>", "\U000f0000"])
def test_auto_refuses_a_control_token_or_sentinel_it_cannot_keep_apart(
    forged: str, tokenizer: Callable[..., Any]
) -> None:
    bound = AUTO.for_tokenizer(tokenizer(CHANGES))
    with pytest.raises(DataError, match=r"data spells the control token .* does not keep data apart"):
        bound.render(talk(("user", forged), ("assistant", "x")))


def test_auto_keeps_a_sentinel_character_in_data_as_it_is(tokenizer: Callable[..., Any]) -> None:
    text = "\U000f0001\U000f0000"
    segments = AUTO.for_tokenizer(tokenizer()).render(talk(("user", text), ("assistant", "x")))
    assert data(list(segments)) == [text, "x"]


TOOL_JINJA = CHATML.replace("{% for", "{% if tools %}{{ tools | tojson }}{% endif %}{% for").replace(
    "+ '<|im_end|>'", "+ (message.tool_calls | tojson if message.tool_calls else '') + '<|im_end|>'"
)


def test_auto_passes_tools_and_calls_in_openais_form(tokenizer: Callable[..., Any]) -> None:
    bound = AUTO.for_tokenizer(tokenizer(TOOL_JINJA))
    text = shown(bound.render(TOOL_TALK))
    assert bound.supports_tools
    assert text.startswith('[{"type": "function", "function": {"name": "f"}}]<|im_start|>system')
    assert '[Wait.[{"type": "function", "function": {"name": "f", "arguments": {"a": "ä"}}}, ' in text


@pytest.mark.parametrize("where", ["schema", "arguments"])
def test_auto_refuses_control_tokens_in_what_jinja_writes_as_markup(where: str, tokenizer: Callable[..., Any]) -> None:
    call = Message("assistant", (), (ToolCall("f", {"a": "<|im_end|>" if where == "arguments" else ""}),))
    tool = {"name": "<|im_start|>" if where == "schema" else "f"}
    conversation = Conversation((*talk(("user", "q")).messages, call), (tool,))
    with pytest.raises(DataError, match=r"data spells the control token '<\|im_"):
        AUTO.for_tokenizer(tokenizer(TOOL_JINJA)).render(conversation)


def test_auto_refuses_tools_that_the_template_ignores(tokenizer: Callable[..., Any]) -> None:
    bound = AUTO.for_tokenizer(tokenizer())
    assert not bound.supports_tools
    with pytest.raises(DataError, match="ignores tools; choose 'chatml'"):
        bound.render(TOOL_TALK)


def test_auto_without_a_chat_template_names_what_to_choose(tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"no chat_template .*choose one by name, such as 'chatml'"):
        AUTO.for_tokenizer(tokenizer(None))


@pytest.mark.parametrize(
    ("jinja", "why"),
    [
        (f"{HEADER}{{{{ m.role }}}}: {{{{ m.content }}}}\n{{% endfor %}}", "ends it with no control token"),
        ("{{ messages | length }}" + CHATML, "its prompt .* is not a prefix"),
        ("{{ raise_exception('no') }}", "refuses the conversation: TemplateError: no"),
        ("{% if messages | length < 4 %}{{ raise_exception('no') }}{% endif %}" + CHATML, "cannot be rendered alone"),
    ],
)
def test_auto_refuses_a_template_whose_mask_is_not_certain(jinja: str, why: str, tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=why):
        AUTO.for_tokenizer(tokenizer(jinja))


@pytest.mark.parametrize(
    ("conversation", "why"),
    [
        (talk(("assistant", "x")), r"messages\[0\] cannot be trained: the conversation begins with it"),
        (Conversation((Message("user", (Text("x"),), loss=True),)), "can train the assistant's messages only"),
    ],
)
def test_auto_names_the_message_it_cannot_train(
    conversation: Conversation, why: str, tokenizer: Callable[..., Any]
) -> None:
    bound = AUTO.for_tokenizer(tokenizer())
    with pytest.raises(DataError, match=why):
        bound.render(conversation)
    assert shown(bound.render(conversation, generation_prompt=True)).endswith("<|im_start|>assistant\n")


def test_auto_refuses_a_template_that_loses_an_image(tokenizer: Callable[..., Any]) -> None:
    bound = AUTO.for_tokenizer(tokenizer(CHATML.replace("message['content']", "message['content'][-1:]")))
    with pytest.raises(DataError, match="loses or repeats an image"):
        bound.render(Conversation((Message("user", (Image("1"), Text("a"))), *talk(("assistant", "x")).messages)))


def test_auto_must_be_bound_to_a_tokenizer() -> None:
    with pytest.raises(DataError, match="call for_tokenizer"):
        AUTO.render(talk(*TALK))


def test_bound_templates_pickle_with_their_tokenizer(tokenizer: Callable[..., Any]) -> None:
    hf = tokenizer()
    for template in (AUTO, VICUNA, PLAIN):
        again = pickle.loads(pickle.dumps(bound := template.for_tokenizer(hf)))
        assert list(again.render(talk(*TALK[:2]))) == list(bound.render(talk(*TALK[:2])))


def test_data_that_spells_a_control_token_stays_text_next_to_real_ones(tokenizer: Callable[..., Any]) -> None:
    hf = tokenizer()
    for template in (CHATML_TEMPLATE, AUTO):
        segments = template.for_tokenizer(hf).render(talk(("user", "<|im_end|>"), ("assistant", "a<|im_start|>b")))
        ids = tokenize(segments, Tokenizer(hf)).input_ids.tolist()
        assert ids.count(hf.convert_tokens_to_ids("<|im_end|>")) == 2
        assert ids.count(hf.convert_tokens_to_ids("<|im_start|>")) == 2


BLOCKS = (
    HEADER
    + ROLE
    + "{% if m.role == 'assistant' %}{% generation %}{% if loop.last %}!{% endif %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}" + PROMPT
)


@pytest.mark.parametrize(
    "jinja", [BLOCKS, BLOCKS.replace("<|im_end|>{% end", "{% end").replace("{{ '\n' }}", "<|im_end|>")]
)
def test_auto_trains_what_generation_blocks_mark_and_the_end_of_the_turn(
    jinja: str, tokenizer: Callable[..., Any]
) -> None:
    """Prefix rendering would train the last turn alone here: the first is written otherwise once others follow."""
    text = shown(AUTO.for_tokenizer(tokenizer(jinja)).render(talk(*TALK)))
    assert "[Hello<|im_end|>]" in text and "[!Ciao<|im_end|>]" in text


def test_auto_warns_of_a_template_that_writes_todays_date(
    tokenizer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        AUTO.for_tokenizer(tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML))
    assert "writes today's date (strftime_now)" in caplog.text


@pytest.mark.parametrize("jinja", [CHATML, STRIPS, BLOCKS])
def test_auto_renders_each_conversation_of_a_known_shape_once(jinja: str, tokenizer: Callable[..., Any]) -> None:
    hf = tokenizer(jinja)
    bound, real, rendered = AUTO.for_tokenizer(hf), hf.apply_chat_template, []
    hf.apply_chat_template = lambda *given, **options: rendered.append(given) or real(*given, **options)
    bound.render(talk(("user", "q"), ("assistant", "a")))
    first = len(rendered)
    bound.render(talk(("user", " question "), ("assistant", "answer")))
    assert len(rendered) == first + 1


SHAPES = (
    talk(*TALK),
    talk(*TALK, ("user", "Encore"), ("assistant", "Oui")),
    talk(("user", " x\n"), ("assistant", "<|im_end|>")),
    talk(("user", ""), ("assistant", "\U000f0001")),
    Conversation((Message("user", (Image("1"), Text("a"), Image("1"))), *talk(("assistant", "b")).messages)),
    Conversation(
        (*talk(("user", "a")).messages, Message("assistant", (Text("b"),), loss=False), *talk(*TALK).messages)
    ),
    TOOL_TALK,
    Conversation(TOOL_TALK.messages, ({"name": "other"},)),
)


@pytest.mark.parametrize("jinja", [CHATML, STRIPS, CHANGES, REWRITES, BLOCKS, TOOL_JINJA])
@pytest.mark.parametrize("prompt", [False, True])
def test_auto_gives_the_same_for_a_shape_it_knows(jinja: str, prompt: bool, tokenizer: Callable[..., Any]) -> None:
    def outcome(bound: Any, conversation: Conversation) -> Any:
        try:
            return list(bound.render(conversation, generation_prompt=prompt))
        except DataError as error:
            return str(error)

    hf = tokenizer(jinja)
    used = AUTO.for_tokenizer(hf)
    for conversation in (*SHAPES, *reversed(SHAPES)):
        assert outcome(used, conversation) == outcome(AUTO.for_tokenizer(hf), conversation)


def test_auto_refuses_a_template_that_swaps_images_whatever_it_saw_before(tokenizer: Callable[..., Any]) -> None:
    bound = AUTO.for_tokenizer(tokenizer(CHATML.replace("message['content']", "message['content'] | reverse")))
    for second in "12":
        with pytest.raises(DataError, match="loses or repeats an image"):
            bound.render(
                Conversation((Message("user", (Image("1"), Image(second))), *talk(("assistant", "x")).messages))
            )


def test_auto_keeps_contents_as_data_when_the_date_changes_under_way(tokenizer: Callable[..., Any]) -> None:
    hf = tokenizer("{% set how = strftime_now %}Monday" + CHATML)
    bound = AUTO.for_tokenizer(hf)
    bound.render(talk(*TALK[:2]))
    hf.chat_template = hf.chat_template.replace("Monday", "Tuesday")
    segments = list(bound.render(talk(("user", "<|im_end|>"), ("assistant", "x"))))
    assert data(segments) == ["<|im_end|>", "x"] and shown(segments).startswith("Tuesday")

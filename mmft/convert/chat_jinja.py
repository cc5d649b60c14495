"""The chat template of an exported model, as jinja, proved to give the token ids that training saw.

Three candidates, the first that passes the proof is taken: the tokenizer's own template, the same with its clock
stopped, and one written from the grammar of the template the model was trained with. Each gets a head that turns the
parts of a message into text, so that pictures can be given as transformers' processors take them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmft.convert.grammar import NUMBER, Grammar, ToolGrammar, read_grammar
from mmft.data.proof import CLOCK, DATE
from mmft.data.proof_cases import CASES, Case, as_messages
from mmft.data.tokenize import IMAGE_TOKEN, Tokenizer, tokenize
from mmft.errors import ConfigError, DataError, ModelError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Text

# A picture at the start of a message is followed by a line break, as the `llava` data map and `mmft chat` write it.
SAID = (
    """{%- macro said(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}
{%- set at = namespace(start=true) -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}
{{- '"""
    + IMAGE_TOKEN
    + """' -}}
{%- set following = '' if loop.last else (loop.nextitem.text or '') -%}
{%- if at.start and not following.startswith('\\n') -%}{{- '\\n' -}}{%- endif -%}
{%- else -%}
{%- set at.start = false -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
)
FLATTENED = (
    SAID
    + """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set flat.messages = flat.messages + [dict(message, content=said(message.content))] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
)


@dataclass(frozen=True)
class Proved:
    """A jinja template, where it is from, what it was tried on, and whether it writes tools."""

    jinja: str
    origin: str
    cases: tuple[str, ...]
    tools: bool


def jinja_of(template: ChatTemplate, tokenizer: Tokenizer) -> Proved:
    """The jinja of a bound template for its tokenizer; one that writes tools where the template does, if there is any.

    Raises `ModelError` with the first difference where no candidate gives the template's ids.
    """
    refusals, without_tools = [], None
    for origin, jinja in _candidates(template, tokenizer):
        cases, difference = prove(jinja, template, tokenizer)
        if difference is not None:
            refusals.append(f"{origin}: {difference}")
            continue
        tools = template.supports_tools and any("tool" in case for case in cases)
        found = Proved(jinja, origin, tuple(cases), tools)
        if tools or not template.supports_tools:
            return found
        without_tools = without_tools or found
    if without_tools:
        return without_tools
    raise ModelError(
        f"chat template {template.name!r}: no jinja template gives its token ids: "
        f"{'; '.join(refusals) or 'none is known'}; give the tokenizer a chat_template of its own and train with 'auto'"
    )


def _candidates(template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    head = FLATTENED if tokenizer.image_id is not None else ""
    try:
        own = tokenizer.hf.get_chat_template()
    except ValueError:  # it has none, or several and none of them the default
        own = None
    if own:
        yield "the tokenizer's own", head + own
        stopped = CLOCK.sub(lambda call: repr(DATE.strftime(call[2])), own)
        if stopped != own:
            yield "the tokenizer's own with a fixed date", head + stopped
    if grammar := read_grammar(template):
        yield f"written from the template {template.name!r}", write_jinja(grammar)


def prove(jinja: str, template: ChatTemplate, tokenizer: Tokenizer) -> tuple[list[str], str | None]:
    """The names of the cases in which every prompt has the template's ids, and the first difference, if any.

    Cases the template itself refuses are left out; so are tools where no candidate may know them.
    """
    passed: list[str] = []
    for case in _cases(pictures=tokenizer.image_id is not None):
        compared = 0
        for prompt, messages in _prompts(case):
            try:
                ours = tokenize(template.render(prompt, generation_prompt=True), tokenizer).input_ids.tolist()
            except (DataError, ConfigError):
                continue
            try:
                theirs = _theirs(jinja, messages, prompt, tokenizer)
            except (
                Exception
            ) as error:  # a template may raise anything: TemplateError, but TypeError or KeyError as well
                if case.conversation.tools:
                    compared = 0
                    break
                return passed, f"{case.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if ours != theirs:
                if case.conversation.tools and not _writes_tools(jinja, prompt, tokenizer):
                    compared = 0
                    break
                return passed, f"{case.name}: {_shown(ours, tokenizer)!r} against {_shown(theirs, tokenizer)!r}"
            compared += 1
        if compared:
            passed.append(case.name)
    return (passed, None) if passed else (passed, "the template takes no text")


def _cases(*, pictures: bool) -> Iterator[Case]:
    for case in CASES:
        if not case.conversation.images:
            yield case
    if not pictures:
        return
    for name, parts in (
        ("a picture and a question", (Image("a"), Text("\nWhat is it?"))),
        ("two pictures", (Image("a"), Text("\n"), Image("b"), Text("\nCompare."))),
        ("pictures inside", (Text("Is "), Image("a"), Text(" like "), Image("b"), Text("?"))),
    ):
        question, answer = Message("user", parts), Message("assistant", (Text("A cat."),))
        yield Case(name, Conversation((question, answer, Message("user", (Text("Why?"),)), answer)))


def _prompts(case: Case) -> Iterator[tuple[Conversation, list[dict[str, Any]]]]:
    """The prompt of each answer, and how transformers is told of it: once as here, once without line breaks."""
    conversation = case.conversation
    for k, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        prompt = replace(conversation, messages=conversation.messages[:k])
        yield prompt, as_messages(prompt, parts=bool(prompt.images))
        if prompt.images:
            yield prompt, _as_people_write(as_messages(prompt, parts=True))


def _as_people_write(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the line breaks after pictures at the start, which are the template's to write."""
    first = messages[0]
    if first["content"][0]["type"] != "image":
        return messages
    parts = [{**part, "text": part["text"].removeprefix("\n")} if "text" in part else part for part in first["content"]]
    return [{**first, "content": [part for part in parts if part.get("text") != ""]}, *messages[1:]]


def _theirs(jinja: str, messages: list[dict[str, Any]], prompt: Conversation, tokenizer: Tokenizer) -> list[int]:
    text: str = tokenizer.hf.apply_chat_template(
        messages,
        tools=[dict(tool) for tool in prompt.tools] or None,
        chat_template=jinja,
        tokenize=False,
        add_generation_prompt=True,
    )
    ids: list[int] = tokenizer.encode([text])[0].tolist()
    if tokenizer.image_id is None:
        return ids
    return [
        one for token in ids for one in [token] * (tokenizer.tokens_per_image if token == tokenizer.image_id else 1)
    ]


def _writes_tools(jinja: str, prompt: Conversation, tokenizer: Tokenizer) -> bool:
    """Whether the jinja says anything about tools at all."""
    messages = as_messages(replace(prompt, messages=prompt.messages[:1]))
    told = [_theirs(jinja, messages, replace(prompt, tools=tools), tokenizer) for tools in (prompt.tools, ())]
    return told[0] != told[1]


def _shown(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    text = str(tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False))
    return text if len(text) < 300 else f"{text[:150]}…{text[-150:]}"


def write_jinja(grammar: Grammar) -> str:
    """The grammar as a jinja template. A talk it has no string for is refused, never written some other way."""
    lines = [SAID.rstrip("\n"), "{%- set at = namespace(previous='', questions=0, last=-1) -%}"]
    lines += ["{%- set turns = messages -%}"]
    lines += ["{%- set system = '' -%}", *_opening(grammar)]
    lines += ["{%- for message in turns -%}", f"{{%- set text = said(message.content){_trim(grammar, 'message')} -%}}"]
    lines += ["{%- if message.role == 'user' -%}{%- set at.questions = at.questions + 1 -%}{%- endif -%}"]
    if grammar.system_last:
        lines += [f"{{%- if {_told(grammar)} and loop.index0 == at.last -%}}"]
        lines += [f"{{%- set text = system ~ {_literal(grammar.system[1])} ~ text -%}}{{%- endif -%}}"]
    lines += ["{%- set pair = at.previous ~ '>' ~ message.role -%}"]
    lines += ["{%- if pair == '>user' -%}{{- opening -}}"]
    lines += [f"{{%- elif pair == '{a}>{b}' -%}}{{{{- {_literal(gap)} -}}}}" for (a, b), gap in grammar.between.items()]
    lines += [
        "{%- else -%}{{- raise_exception('this chat format has no place for the role ' ~ message.role ~ ' here') -}}",
        "{%- endif -%}",
        "{{- text -}}",
        *(_calls(grammar.tools) if grammar.tools else ()),
        "{%- set at.previous = message.role -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        *_by_role(grammar.prompts),
        "{%- else -%}",
        *_by_role(grammar.ends),
        "{%- endif -%}",
    ]
    return "\n".join(lines)


def _opening(grammar: Grammar) -> Iterator[str]:
    before, after = grammar.system
    yield "{%- set opening = " + _literal(grammar.opening) + " -%}"
    yield "{%- if messages and messages[0].role == 'system' -%}"
    yield "{%- set turns = messages[1:] -%}"
    yield "{%- set system = said(messages[0].content)" + (" | trim" if "system" in grammar.trims else "") + " -%}"
    if not grammar.system_last:
        told = f"{_literal(before)} ~ system ~ {_literal(after)}"
        yield f"{{%- set opening = ({told}) if system else {_literal(grammar.opening_empty)} -%}}"
    yield "{%- endif -%}"
    if grammar.system_last:
        yield "{%- for message in turns -%}{%- if message.role == 'user' -%}{%- set at.last = loop.index0 -%}"
        yield "{%- endif -%}{%- endfor -%}"
    if grammar.tools:
        yield "{%- if tools -%}"
        yield "{%- set schemas = namespace(text='') -%}"
        yield "{%- for tool in tools -%}"
        gap = f"('' if loop.first else {_literal(grammar.tools.plain[1])})"
        yield "{%- set schemas.text = schemas.text ~ " + gap + " ~ (tool | tojson) -%}"
        yield "{%- endfor -%}"
        first, middle, _, last = grammar.tools.with_system
        yield (
            f"{{%- set opening = ({_literal(first)} ~ system ~ {_literal(middle)} ~ schemas.text ~ {_literal(last)})"
            f" if system else ({_literal(grammar.tools.plain[0])} ~ schemas.text ~ {_literal(grammar.tools.plain[2])})"
            " -%}"
        )
        yield "{%- endif -%}"
    else:
        yield "{%- if tools -%}{{- raise_exception('this chat format has no form for tools') -}}{%- endif -%}"


def _told(grammar: Grammar) -> str:
    """Whether there is a system text to move: in some formats an empty one is."""
    return "system" if grammar.opening_empty == grammar.opening else "turns | length < messages | length"


def _calls(tools: ToolGrammar) -> Iterator[str]:
    before, middle, after = (_literal(text) for text in tools.call)
    yield "{%- for call in message.tool_calls or [] -%}"
    yield "{%- set called = call.function if call.function else call -%}"
    yield (
        f"{{{{- ({_literal(tools.after_text)} if text else '') if loop.first else {_literal(tools.between_calls)} -}}}}"
    )
    yield f"{{{{- {before} ~ called.name ~ {middle} -}}}}"
    yield "{{- called.arguments if called.arguments is string else (called.arguments | tojson) -}}"
    yield f"{{{{- {after} -}}}}"
    yield "{%- endfor -%}"


def _by_role(strings: Any) -> Iterator[str]:
    word = "if"
    for role, text in strings.items():
        yield f"{{%- {word} at.previous == '{role}' -%}}{{{{- {_literal(text)} -}}}}"
        word = "elif"
    yield "{%- endif -%}"


def _trim(grammar: Grammar, name: str) -> str:
    """The filter for a message's text, which depends on its role."""
    roles = sorted(grammar.trims - {"system"})
    if not roles:
        return ""
    if len(roles) == 2:
        return " | trim if message.role != 'tool' else said(message.content)"
    return f" | trim if {name}.role == '{roles[0]}' else said(message.content)"


def _literal(text: str) -> str:
    """A jinja expression for a string; the number of the question is put in."""
    pieces = [json.dumps(piece, ensure_ascii=False) for piece in text.split(NUMBER)]
    return " ~ (at.questions | string) ~ ".join(pieces)

"""Mistral's tools: the schemas before the last question, calls and results as JSON with an id of nine characters.

https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3 and Mistral-Nemo-Instruct-2407, tokenizer_config.json.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Message, Segment
from mmft_plugins._families import Family, render_family, with_system
from mmft_plugins._tools import as_json, markup, numbered
from mmft_plugins.templates import content, stripped


def render_mistral(
    form: Family, conversation: Conversation, /, *, space: str, generation_prompt: bool = False
) -> list[Segment]:
    """Render by the family's row, and tools where the conversation has any; `space` stands after each control token.

    The schemas stand before the last question (and before an earlier one of the same words, as the models' own template
    finds it by comparing), so earlier answers were given without them there: they are not trained. Ids in another form
    are replaced. Raises `DataError` for what the format has no place for: a text beside a call, tools and no question.
    """
    told = conversation.tools
    if not told and not any(m.tool_calls or m.role == "tool" for m in conversation.messages):
        return render_family(form, conversation, generation_prompt=generation_prompt)
    asked = [m.parts for m in conversation.messages if m.role == "user"]
    if told and not asked:
        raise DataError(f"chat template {form.name!r}: tools stand before the last question, and there is none")
    edged = (stripped(m) if m.role in form.strips else m for m in numbered(conversation).messages)
    messages = with_system(form, replace(conversation, messages=tuple(edged)))
    last = max((number for number, message in enumerate(messages) if message.role == "user"), default=-1)
    shift = len(conversation.messages) - len(messages)
    segments = markup(form.bos)
    for number, message in enumerate(messages):
        loss = message.is_trained and not (told and number < last)
        if message.role == "tool":
            segments += _result(message, space)
        elif message.tool_calls:
            segments += [*_calls(form.name, message, space, loss), *markup(form.end, loss)]
        elif message.role == "assistant":
            body = content(replace(message, loss=loss))
            segments += [*markup(form.prompt), *markup(form.lead, loss), *body, *markup(form.end, loss)]
        else:
            own = conversation.messages[number + shift].parts if message.role == "user" else None
            segments += _schemas(told, space) if told and own == asked[-1] else []
            segments += [*markup(form.user[0]), *content(message), *markup(form.user[1])]
    return segments + markup(form.prompt if generation_prompt else form.close)


def _schemas(tools: tuple[Mapping[str, Any], ...], space: str) -> list[Segment]:
    """Strings of a function's first level stand unescaped between quotes, as the models' own template has them."""
    written = []
    for tool in tools:
        fields = [
            f'"{key}": ' + (f'"{value}"' if isinstance(value, str) else as_json(value))
            for key, value in tool["function"].items()
            if key != "return"
        ]
        written.append('{"type": "function", "function": {' + ", ".join(fields) + "}}")
    return [*markup(f"[AVAILABLE_TOOLS]{space}["), Segment(", ".join(written)), *markup("][/AVAILABLE_TOOLS]")]


def _calls(name: str, message: Message, space: str, loss: bool) -> list[Segment]:
    if message.text.strip() or message.images:
        raise DataError(
            f"chat template {name!r} has no place for a text beside a call; take one of them out, or choose 'chatml' "
            "with data.allow_template_difference=True"
        )
    calls = ({"name": call.name, "arguments": dict(call.arguments), "id": call.id} for call in message.tool_calls)
    written = ", ".join(map(as_json, calls))
    return [*markup(f"[TOOL_CALLS]{space}[", loss), Segment(written, loss), *markup("]", loss)]


def _result(message: Message, space: str) -> list[Segment]:
    body = content(replace(message, loss=False))
    end = [*markup(', "call_id": "'), Segment(str(message.call_id)), *markup('"}[/TOOL_RESULTS]')]
    return [*markup(f'[TOOL_RESULTS]{space}{{"content": '), *body, *end]

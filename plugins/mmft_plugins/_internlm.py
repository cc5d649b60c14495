r"""InternLM2.5's and 3's tools: a system turn of their own, calls between action tokens, results from the environment.

    <|im_start|>system name=<|plugin|>\n[{...}, {...}]<|im_end|>
    <|im_start|>assistant\ntext<|action_start|><|plugin|>\n{"name": ..., "parameters": {...}}<|action_end|><|im_end|>
    <|im_start|>environment name=<|plugin|>\nresult<|im_end|>

https://github.com/InternLM/InternLM/blob/1182cbb/chat/chat_format.md. The models' own template ignores tools that it is
given apart, but writes any role as it is named, and so this.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmft.types import Conversation, Message, Segment
from mmft_plugins._families import Family, render_family
from mmft_plugins._tools import as_json, markup
from mmft_plugins.templates import content

NAMED = " name=<|plugin|>\n"
BEGIN, END = "<|action_start|><|plugin|>\n", "<|action_end|>"


def render_internlm(form: Family, conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render by the family's row, and tools where the conversation has any: after the system text, if there is one."""
    messages = conversation.messages
    if not conversation.tools and not any(m.tool_calls or m.role == "tool" for m in messages):
        return render_family(form, conversation, generation_prompt=generation_prompt)
    head = bool(messages) and messages[0].role == "system"
    plain = render_family(form, replace(conversation, messages=messages[:head], tools=()))
    segments = plain + _schemas(conversation.tools)
    for message in messages[head:]:
        loss = message.is_trained
        name = f"environment{NAMED}" if message.role == "tool" else f"{message.role}\n"
        segments += [*markup(f"<|im_start|>{name}"), *content(message), *_calls(message)]
        segments += [*markup(form.end, loss), *markup(form.after)]
    return segments + markup(form.prompt if generation_prompt else form.close)


def _schemas(tools: tuple[Mapping[str, Any], ...]) -> list[Segment]:
    if not tools:
        return []
    written = as_json([tool["function"] for tool in tools])
    return [*markup(f"<|im_start|>system{NAMED}"), Segment(written), *markup("<|im_end|>\n")]


def _calls(message: Message) -> list[Segment]:
    loss, segments = message.is_trained, list[Segment]()
    for call in message.tool_calls:
        written = as_json({"name": call.name, "parameters": dict(call.arguments)})
        segments += [*markup(BEGIN, loss), Segment(written, loss), *markup(END, loss)]
    return segments

"""DeepSeek V3.1 and its tools, and what all DeepSeek V3 do with system texts.

Of V3.1 this is the mode without thoughts: `</think>` stands after the token of an answer, and nothing at all between a
tool's output and the answer to it. Its own template writes calls and results; the schemas of the tools, which it leaves
out, stand in the system text as the model card has them (https://huggingface.co/deepseek-ai/DeepSeek-V3.1, ToolCall).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmft.types import Conversation, Message, Segment, Text
from mmft_plugins._tools import as_json, markup
from mmft_plugins.templates import content

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, PROMPT = "<｜User｜>", "<｜Assistant｜></think>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
THOUGHT_END = "</think>"
HOW = (
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    f"{CALLS}{CALL}tool_call_name{SEPARATOR}tool_call_arguments{CALL_END}{{additional_tool_calls}}{CALLS_END}\n\n"
    "Where:\n- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)


def prepare_deepseek(conversation: Conversation) -> Conversation:
    """DeepSeek V3 writes all system texts before everything, an empty line between them."""
    texts = [message.text for message in conversation.messages if message.role == "system"]
    rest = tuple(message for message in conversation.messages if message.role != "system")
    head = (Message("system", (Text("\n\n".join(texts)),)),) if texts else ()
    return replace(conversation, messages=(*head, *rest))


def render_deepseek(conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render DeepSeek V3.1's format without thoughts.

    An answer that holds thoughts as text loses them, as in the model's own template.
    """
    segments, last = markup(BOS), ""
    messages = prepare_deepseek(conversation).messages
    if not messages or messages[0].role != "system":
        segments += _schemas(conversation.tools)
    for message in messages:
        loss = message.is_trained
        if message.role == "system":
            segments += [*content(message), *_schemas(conversation.tools)]
        elif message.role == "user":
            segments += [*markup(USER), *content(message)]
        elif message.role == "tool":
            segments += [*markup(OUTPUT), *content(message), *markup(OUTPUT_END)]
        else:
            body = content(message if message.tool_calls or last == "tool" else _without_thoughts(message))
            segments += [*(markup(PROMPT) if last == "user" else []), *body, *_calls(message), *markup(END, loss)]
        last = message.role
    return segments + (markup(PROMPT) if generation_prompt and last == "user" else [])


def _without_thoughts(message: Message) -> Message:
    if THOUGHT_END not in message.text or message.images:
        return message
    return replace(message, parts=(Text(message.text.partition(THOUGHT_END)[2]),))


def _schemas(tools: tuple[Mapping[str, Any], ...]) -> list[Segment]:
    if not tools:
        return []
    segments = markup("\n\n## Tools\nYou have access to the following tools:\n")
    for tool in tools:
        function = tool["function"]
        segments += [*markup("\n### "), Segment(function["name"]), *markup("\nDescription: ")]
        segments += [Segment(str(function.get("description", ""))), *markup("\n\nParameters: ")]
        segments += [Segment(as_json(function.get("parameters", {}))), *markup("\n")]
    return segments + markup(HOW)


def _calls(message: Message) -> list[Segment]:
    if not message.tool_calls:
        return []
    loss = message.is_trained
    segments = markup(CALLS, loss)
    for call in message.tool_calls:
        segments += [*markup(CALL, loss), Segment(call.name, loss), *markup(SEPARATOR, loss)]
        segments += [Segment(as_json(dict(call.arguments)), loss), *markup(CALL_END, loss)]
    return segments + markup(CALLS_END, loss)

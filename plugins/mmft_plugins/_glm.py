r"""GLM-4: no token of its own ends a turn, the one that opens the next does, and that is what a model stops at.

    <|system|>\n the tools, <|system|>\n the system text
    <|user|>\n question
    <|assistant|>name\n{arguments}<|observation|>\n result
    <|assistant|>\n answer<|user|>

An answer begins with the line break, a call with the tool's name. The model's own template takes tools, calls and
results in messages of its own form (`tools`, `metadata`, the role `observation`); this is what it writes for them under
transformers, which takes the first of two line breaks after a block away, so that one stands before a schema.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Message, Role, Segment
from mmft_plugins._tools import as_json, markup
from mmft_plugins.templates import content

BOS, PROMPT = "[gMASK]<sop>", "<|assistant|>"
OPENS: Mapping[Role, str] = {"system": "<|system|>", "user": "<|user|>", "tool": "<|observation|>"}
ENDS: tuple[Role, ...] = ("user", "tool")  # whose tokens end an assistant's turn
TOLD = (
    "<|system|>\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
HOW = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


def render_glm(conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render a conversation, with its tools if it has any; an empty system text or question is left out.

    Raises `DataError` for what the format has no place for: a text beside a call, two calls in one turn.
    """
    segments = [*markup(BOS), *_schemas(conversation.tools)]
    messages = conversation.messages
    for number, message in enumerate(messages):
        if message.role == "assistant":
            segments += [*markup(PROMPT), *_answer(message), *_end(message, messages[number + 1 : number + 2])]
        elif message.role == "tool" or message.text or message.images:
            opened = number > 0 and messages[number - 1].role == "assistant" and message.role in ENDS
            segments += [*markup(("" if opened else OPENS[message.role]) + "\n"), *content(message)]
    return segments + (markup(PROMPT) if generation_prompt else [])


def _schemas(tools: Sequence[Mapping[str, Any]]) -> list[Segment]:
    segments = markup(TOLD) if tools else []
    for tool in tools:
        function = tool["function"]
        segments += [*markup("\n## "), Segment(f"{function['name']}\n\n{as_json(function, indent=4)}"), *markup(HOW)]
    return segments


def _answer(message: Message) -> list[Segment]:
    loss = message.is_trained
    if not message.tool_calls:
        return [*markup("\n", loss), *content(message)]
    if len(message.tool_calls) > 1 or message.text or message.images:
        raise DataError(
            "chat template 'glm4' takes one call a turn and no text beside it; split the turn, or choose 'chatml' "
            "with data.allow_template_difference=True"
        )
    call = message.tool_calls[0]
    return [Segment(call.name, loss), *markup("\n", loss), Segment(as_json(dict(call.arguments)), loss)]


def _end(message: Message, following: Sequence[Message]) -> list[Segment]:
    """The token that opens the next turn; after the last one, if it is trained, the one that would."""
    loss = message.is_trained
    if not following:
        return markup(OPENS["tool" if message.tool_calls else "user"], loss) if loss else []
    return markup(OPENS[following[0].role], loss) if following[0].role in ENDS else []

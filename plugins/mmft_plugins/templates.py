"""Chat templates: how a conversation becomes text, and which of that text is trained, decided in one place.

An answer is trained together with the token that ends it; the newline some formats write after that token is not,
because generation has stopped by then. `auto` takes the format from the tokenizer itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Message, Segment, Text
from mmft_plugins._auto_template import bind_auto, render_unbound

# LLaVA's `conv_vicuna_v1`: https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/conversation.py
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The tool block of Qwen2.5 and Qwen3, after Hermes: https://github.com/NousResearch/Hermes-Function-Calling
TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFormat:
    """A format in which every turn is `before_role + role + after_role + content + end`, then `after` untrained."""

    name: str
    before_role: str
    after_role: str
    end: str
    after: str = ""
    bos: str = ""
    strips: bool = False
    tools: bool = False


CHATML = TurnFormat(
    name="chatml", before_role="<|im_start|>", after_role="\n", end="<|im_end|>", after="\n", tools=True
)
INTERNLM2 = TurnFormat(
    name="internlm2_chat", before_role="<|im_start|>", after_role="\n", end="<|im_end|>", after="\n", bos="<s>"
)
LLAMA3 = TurnFormat(
    name="llama3_chat",
    before_role="<|start_header_id|>",
    after_role="<|end_header_id|>\n\n",
    end="<|eot_id|>",
    bos="<|begin_of_text|>",
    strips=True,
)


def render_turns(form: TurnFormat, conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render a format made of uniform turns.

    Raises `DataError` where the conversation has tools and the format has no form for them.
    """
    if not form.tools:
        refuse_tools(form.name, conversation)
    messages = conversation.messages
    segments = _markup(form.bos)
    if conversation.tools and (not messages or messages[0].role != "system"):
        segments += _turn(form, "system", _tool_block(conversation.tools), loss=False)
    for index, message in enumerate(messages):
        if message.role == "tool":
            segments += _tool_result(form, messages, index)
            continue
        body = _content(_stripped(message) if form.strips else message)
        if index == 0 and message.role == "system" and conversation.tools:
            body += [*_markup("\n\n"), *_tool_block(conversation.tools)]
        segments += _turn(form, message.role, [*body, *_tool_calls(message)], loss=message.is_trained)
    return segments + (_markup(f"{form.before_role}assistant{form.after_role}") if generation_prompt else [])


def _turn(form: TurnFormat, role: str, body: Sequence[Segment], *, loss: bool) -> list[Segment]:
    header = _markup(f"{form.before_role}{role}{form.after_role}")
    return [*header, *body, *_markup(form.end, loss), *_markup(form.after)]


def _tool_block(tools: Sequence[Mapping[str, Any]]) -> list[Segment]:
    lines = "".join(f"\n{json.dumps(dict(tool), ensure_ascii=False)}" for tool in tools)
    return [*_markup(TOOLS_BEFORE), Segment(lines), *_markup(TOOLS_AFTER)]


def _tool_calls(message: Message) -> list[Segment]:
    """The calls an assistant makes, a line break between them and after a text; the turn's header ends in one."""
    segments: list[Segment] = []
    loss = message.is_trained
    for call in message.tool_calls:
        gap = "\n" if segments or message.text or message.images else ""
        segments += _markup(f'{gap}<tool_call>\n{{"name": "', loss)
        segments += [Segment(call.name, loss), *_markup('", "arguments": ', loss)]
        segments.append(Segment(json.dumps(dict(call.arguments), ensure_ascii=False), loss))
        segments += _markup("}\n</tool_call>", loss)
    return segments


def _tool_result(form: TurnFormat, messages: Sequence[Message], index: int) -> list[Segment]:
    """One tool's output; outputs that follow one another share a turn of the user. Never trained."""
    opens = index == 0 or messages[index - 1].role != "tool"
    closes = index + 1 == len(messages) or messages[index + 1].role != "tool"
    header = f"{form.before_role}user{form.after_role}" if opens else "\n"
    body = [Segment(part.text) if isinstance(part, Text) else Segment(part) for part in messages[index].parts]
    end = "\n</tool_response>" + (form.end + form.after if closes else "")
    return [*_markup(f"{header}<tool_response>\n"), *body, *_markup(end)]


def render_vicuna(
    conversation: Conversation, /, *, generation_prompt: bool = False, bos: str = "<s>", eos: str = "</s>"
) -> list[Segment]:
    """LLaVA's v1: `{system} USER: {question} ASSISTANT: {answer}</s>USER: ...`.

    A system message at the start replaces the preamble. The space before an answer is trained with it.
    """
    refuse_tools("vicuna", conversation)
    messages = conversation.messages
    if not messages or messages[0].role != "system":
        messages = (Message("system", (Text(VICUNA_SYSTEM),)), *messages)
    segments, gap = _markup(bos), ""
    for message in messages:
        loss = message.is_trained
        if message.role == "assistant":
            segments += [*_markup(f"{gap}ASSISTANT:"), *_markup(" ", loss), *_content(message), *_markup(eos, loss)]
            gap = ""
        elif message.role == "user":
            segments += [*_markup(f"{gap}USER: "), *_content(message)]
            gap = " "
        elif message.text:
            segments += [*_markup(gap), *_content(message)]
            gap = " "
    return segments + (_markup(f"{gap}ASSISTANT:") if generation_prompt else [])


def bind_vicuna(tokenizer: Any) -> ChatTemplate:
    """Vicuna's words with the BOS and EOS of this tokenizer; for Llama's `<s>` and `</s>` they are LLaVA's own.

    Raises `DataError` where the tokenizer has no EOS.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if not eos:
        raise DataError("chat template 'vicuna': the tokenizer has no end-of-sequence token to end an answer with")
    # transformers 5 prepends Llama's <s> only if tokenizer_config.json says add_bos_token; the format has it always.
    render = partial(render_vicuna, bos=bos if (bos, eos) == ("<s>", "</s>") else own_bos(tokenizer), eos=eos)
    return ChatTemplate(name="vicuna", render=render, stop=(eos,), source=VICUNA.source)


def render_plain(conversation: Conversation, /, *, generation_prompt: bool = False, bos: str = "") -> list[Segment]:
    r"""LLaVA's stage 1: images, caption, `\n`. What the human says is left out; a prompt is the images alone.

    `preprocess_plain`: https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/train/train.py. No EOS, as there.
    Raises `DataError` for an answer that follows another with no image between, as nothing would ask for it.
    """
    refuse_tools("plain", conversation)
    segments = _markup(bos)
    for message in conversation.messages:
        if message.role == "assistant":
            if segments and segments[-1].content == "\n":
                raise DataError(
                    "chat template 'plain': a second answer with no image before it; this format is for images and "
                    "their captions and leaves questions out; choose a chat format"
                )
            segments += [*_content(message), *_markup("\n", message.is_trained)]
        else:
            segments += [Segment(image) for image in message.images]
    return segments


def bind_plain(tokenizer: Any) -> ChatTemplate:
    """Plain with the BOS of this tokenizer, if it puts one before a text by itself."""
    render = partial(render_plain, bos=own_bos(tokenizer))
    return ChatTemplate(name="plain", render=render, stop=PLAIN.stop, source=PLAIN.source, compare=False)


def own_bos(tokenizer: Any) -> str:
    """The BOS token, if the tokenizer writes one before every text (Llama does, Qwen and SmolLM2 do not)."""
    begins = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


def refuse_tools(name: str, conversation: Conversation) -> None:
    """Raise `DataError` where the conversation has tools, calls or tool output, which this format would lose."""
    if conversation.tools or any(message.tool_calls or message.role == "tool" for message in conversation.messages):
        raise DataError(
            f"chat template {name!r} has no form for tools, and the conversation has them; choose 'chatml', or 'auto' "
            "where the model's own template knows tools"
        )


def _markup(text: str, loss: bool = False) -> list[Segment]:
    return [Segment(text, loss, markup=True)] if text else []


def _content(message: Message) -> list[Segment]:
    return [
        Segment(part.text, message.is_trained) if isinstance(part, Text) else Segment(part) for part in message.parts
    ]


def _stripped(message: Message) -> Message:
    """The message less the white space around its whole content, as jinja's `trim` leaves it."""
    parts = list(message.parts)
    for edge, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while parts and isinstance(part := parts[edge], Text):
            parts[edge] = Text(strip(part.text))
            if parts[edge] != Text(""):
                break
            del parts[edge]
    return replace(message, parts=tuple(parts))


CHATML_TEMPLATE = ChatTemplate(
    name="chatml",
    render=partial(render_turns, CHATML),
    stop=(CHATML.end,),
    supports_tools=True,
    source="https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/tokenizer_config.json, less its default system",
)
INTERNLM2_TEMPLATE = ChatTemplate(
    name="internlm2_chat",
    render=partial(render_turns, INTERNLM2),
    stop=(INTERNLM2.end,),
    source="https://huggingface.co/internlm/internlm2-chat-7b/blob/main/tokenizer_config.json",
)
LLAMA3_TEMPLATE = ChatTemplate(
    name="llama3_chat",
    render=partial(render_turns, LLAMA3),
    stop=(LLAMA3.end,),
    source="https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct/blob/main/tokenizer_config.json",
)
VICUNA = ChatTemplate(
    name="vicuna",
    render=render_vicuna,
    stop=("</s>",),
    source="https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/conversation.py, conv_vicuna_v1",
    bind=bind_vicuna,
)
PLAIN = ChatTemplate(
    name="plain",
    render=render_plain,
    stop=("\n",),
    source="https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/train/train.py, preprocess_plain",
    bind=bind_plain,
    compare=False,
)
AUTO = ChatTemplate(
    name="auto", render=render_unbound, supports_tools=True, source="the tokenizer's own chat_template", bind=bind_auto
)


@hookimpl
def mmft_chat_templates() -> list[ChatTemplate]:
    """The shipped formats."""
    return [CHATML_TEMPLATE, INTERNLM2_TEMPLATE, LLAMA3_TEMPLATE, VICUNA, PLAIN, AUTO]

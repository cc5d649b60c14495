"""Chat templates: how a conversation becomes text, and which of that text is trained, decided in one place.

An answer is trained together with the token that ends it; the newline some formats write after that token is not,
because generation has stopped by then. `auto` takes the format from the tokenizer itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Message, Segment, Text
from mmft_plugins._auto_template import bind_auto, render_unbound
from mmft_plugins._calls import HERMES, read_hermes
from mmft_plugins._tools import markup, tool_block, tool_calls, tool_result

# LLaVA's `conv_vicuna_v1`: https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/conversation.py
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
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
    segments = markup(form.bos)
    if conversation.tools and (not messages or messages[0].role != "system"):
        segments += _turn(form, "system", tool_block(conversation.tools), loss=False)
    for index, message in enumerate(messages):
        if message.role == "tool":
            begin = f"{form.before_role}user{form.after_role}"
            segments += tool_result(messages, index, begin, form.end + form.after)
            continue
        body = content(stripped(message) if form.strips else message)
        if index == 0 and message.role == "system" and conversation.tools:
            body += [*markup("\n\n"), *tool_block(conversation.tools)]
        segments += _turn(form, message.role, [*body, *tool_calls(message)], loss=message.is_trained)
    return segments + (markup(f"{form.before_role}assistant{form.after_role}") if generation_prompt else [])


def _turn(form: TurnFormat, role: str, body: Sequence[Segment], *, loss: bool) -> list[Segment]:
    header = markup(f"{form.before_role}{role}{form.after_role}")
    return [*header, *body, *markup(form.end, loss), *markup(form.after)]


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
    segments, gap = markup(bos), ""
    for message in messages:
        loss = message.is_trained
        if message.role == "assistant":
            segments += [*markup(f"{gap}ASSISTANT:"), *markup(" ", loss), *content(message), *markup(eos, loss)]
            gap = ""
        elif message.role == "user":
            segments += [*markup(f"{gap}USER: "), *content(message)]
            gap = " "
        elif message.text:
            segments += [*markup(gap), *content(message)]
            gap = " "
    return segments + (markup(f"{gap}ASSISTANT:") if generation_prompt else [])


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
    segments = markup(bos)
    for message in conversation.messages:
        if message.role == "assistant":
            if segments and segments[-1].content == "\n":
                raise DataError(
                    "chat template 'plain': a second answer with no image before it; this format is for images and "
                    "their captions and leaves questions out; choose a chat format"
                )
            segments += [*content(message), *markup("\n", message.is_trained)]
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


def content(message: Message) -> list[Segment]:
    """The text and images of a message, trained where the message is."""
    return [
        Segment(part.text, message.is_trained) if isinstance(part, Text) else Segment(part) for part in message.parts
    ]


def stripped(message: Message) -> Message:
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
    read_calls=read_hermes,
    call_marks=(HERMES,),
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

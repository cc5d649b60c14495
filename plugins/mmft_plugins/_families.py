"""One renderer for the chat formats of current model families; a format is a table row, a `Family`.

A row says what stands around a system, a user's and an assistant's turn. What a family does beyond that (Qwen3 takes
thoughts out of the history, Llama 3.1 puts tools into the first question) rewrites the messages before they are
rendered, so that it stays data and cannot forge control tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mmft.errors import DataError
from mmft.types import Conversation, Message, Role, Segment, Text
from mmft_plugins._tools import TOOLS_AFTER, TOOLS_BEFORE, markup, tool_block, tool_calls, tool_result
from mmft_plugins.templates import content, stripped

Around = tuple[str, str]
THOUGHT_END = "</think>\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A chat format as a table row.

    `prompt` opens an assistant's turn, `lead` begins the answer, `end` ends it and is trained, `after` is not.
    `system="first"` or `"last"` puts the system text before the first or the last question. `tool` is what stands
    around a tool's output, `hermes` the sentences around the tools' schemas where calls and results are Hermes'.
    """

    name: str
    user: Around
    prompt: str
    end: str
    lead: str = ""
    after: str = ""
    bos: str = ""
    close: str = ""  # after the last turn, where no prompt follows
    system: Around | Literal["first", "last"]
    default_system: str | None = None
    default_with_tools: bool = True
    default_for_empty: bool = False
    strips: tuple[Role, ...] = ()
    skips_empty: tuple[Role, ...] = ()
    tool: Around | None = None
    hermes: Around | None = None
    thinks: bool = False  # an answer may begin with a block of thoughts, which no line break parts from a call


def qwen(name: str, system: str | None, *, tools: bool = True) -> Family:
    """ChatML with the system text that this Qwen, or a model in its form, writes where there is none."""
    return Family(
        name=name,
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        prompt="<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        default_system=system,
        hermes=(TOOLS_BEFORE, TOOLS_AFTER) if tools else None,
    )


def render_family(
    form: Family,
    conversation: Conversation,
    /,
    *,
    generation_prompt: bool = False,
    prepare: Callable[[Conversation], Conversation] | None = None,
) -> list[Segment]:
    """Render a conversation by its row, after `prepare` has put it in the family's way.

    Raises `DataError` where the conversation has tools and the format has no form for them.
    """
    if not form.hermes and not form.tool:
        _refuse_tools(form, conversation)
    conversation = prepare(conversation) if prepare else conversation
    edged = tuple(stripped(m) if m.role in form.strips else m for m in conversation.messages)
    messages = with_system(form, replace(conversation, messages=edged))
    segments = markup(form.bos)
    for index, message in enumerate(messages):
        if message.role in form.skips_empty and not message.text and not message.images:
            continue
        if message.role == "tool" and form.hermes:
            segments += tool_result(messages, index, form.user[0].rstrip("\n") + "\n", form.user[1])
            continue
        body = content(message)
        if message.role == "assistant":
            gap = not form.thinks or not message.text.endswith(THOUGHT_END)
            answer = [*body, *tool_calls(message, gap=gap)]
            segments += _answer(form, answer, message.is_trained)
            continue
        if index == 0 and form.hermes and conversation.tools:
            space = markup("\n\n") if message.parts else []
            body += [*space, *tool_block(conversation.tools, *form.hermes)]
        before, after = _around(form, message.role)
        segments += [*markup(before), *body, *markup(after)]
    return segments + markup(form.prompt if generation_prompt else form.close)


def _refuse_tools(form: Family, conversation: Conversation) -> None:
    """Raise `DataError` where the conversation has tools, calls or tool output, and say what works.

    DeepSeek V3's own template writes calls, but not what tools there are, and no model card says where they go;
    Gemma's, Phi's and the others' know nothing of tools.
    """
    if conversation.tools or any(message.tool_calls or message.role == "tool" for message in conversation.messages):
        raise DataError(
            f"chat template {form.name!r} has no form for tools, and the conversation has them; its model's own "
            "template ignores tools too, so 'auto' refuses them; choose 'chatml' with "
            "data.allow_template_difference=True"
        )


def _answer(form: Family, body: Sequence[Segment], loss: bool) -> list[Segment]:
    return [
        *markup(form.prompt),
        *markup(form.lead, loss),
        *body,
        *markup(form.end, loss),
        *markup(form.after),
    ]


def _around(form: Family, role: Role) -> Around:
    if role == "tool" and form.tool:
        return form.tool
    if role == "system" and not isinstance(form.system, str):
        return form.system
    return form.user


def with_system(form: Family, conversation: Conversation) -> tuple[Message, ...]:
    """The messages with the family's default system, or with the system text moved into a question.

    Where it moves into the last question, earlier answers were given without it there: they are not trained.
    """
    messages = conversation.messages
    has = bool(messages) and messages[0].role == "system"
    if not isinstance(form.system, str):
        default = form.default_system if form.default_with_tools or not conversation.tools else None
        if default is not None and (not has or (form.default_for_empty and not messages[0].text)):
            return (Message("system", (Text(default),)), *messages[has:])
        return (Message("system"), *messages) if form.hermes and conversation.tools and not has else messages
    if not has:
        return messages
    head, rest = messages[0], list(messages[1:])
    asked = [index for index, message in enumerate(rest) if message.role == "user"]
    if not asked:
        return (replace(head, role="user"), *rest)
    at = asked[0 if form.system == "first" else -1]
    rest[at] = replace(rest[at], parts=(*head.parts, Text("\n\n"), *rest[at].parts))
    return tuple(replace(m, loss=False) if n < at and m.role == "assistant" else m for n, m in enumerate(rest))

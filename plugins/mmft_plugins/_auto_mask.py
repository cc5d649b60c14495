"""Of the chat template `auto`: what a tokenizer's jinja template writes, and where in that the trained answers lie.

Where the template marks answers with `{% generation %}` blocks, one a turn, those are what is trained: less the
prompt's own end where a block begins before it, through the control token that ends the turn. Else the prompt of turn
k, as the template writes it for inference, must be a prefix of the conversation up to k, and that, up to the control
token that ends the turn, a prefix of the whole. What lies between is trained.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Image, Message, Text, ToolCall

FIRST_SENTINEL = 0xF0000  # plane 15, private use: 65,534 characters that no text has
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION = Conversation((Message("user", (Text("x"),)),))
PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}

Parts = list[Text | Image]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class OwnFormat:
    """What is known of a tokenizer: `special` is what data must not spell, `added` is what may end a turn.

    Of its template: `tools` says that it writes them, `blocks` that it marks answers, `dated` that it writes the date;
    `prompt` is what it writes to ask for an answer.
    """

    tokenizer: Any
    special: re.Pattern[str]
    added: re.Pattern[str]
    tools: bool = False
    blocks: bool = False
    dated: bool = False
    prompt: str = ""

    @classmethod
    def of(cls, tokenizer: Any) -> "OwnFormat":
        """What can be told of a tokenizer and its template."""
        added = list(tokenizer.added_tokens_decoder.values())
        special = _any_of(str(token) for token in added if token.special)
        template = str(tokenizer.get_chat_template())
        own = cls(tokenizer, special, _any_of(str(token) for token in added))
        own = replace(own, blocks=bool(GENERATION.search(template)), dated="strftime_now" in template)
        return replace(own, tools=_knows_tools(own), prompt=_own_prompt(own))


def parts_of(message: Message) -> Parts:
    """The parts that write something, and before them what the assistant thought."""
    thoughts: Parts = [Text(message.reasoning)] if message.reasoning else []
    return thoughts + [part for part in message.parts if isinstance(part, Image) or part.text]


def messages_of(conversation: Conversation, *, mask: bool) -> list[dict[str, Any]]:
    """The messages as transformers' templates take them; an image is a sentinel in either case."""
    messages: list[dict[str, Any]] = []
    number = 0
    for message in conversation.messages:
        texts = []
        for part in parts_of(message):
            texts.append(part.text if isinstance(part, Text) and not mask else chr(FIRST_SENTINEL + number))
            number += 1
        written: dict[str, Any] = {"role": message.role, "content": ""}
        if message.reasoning:
            written["reasoning_content"] = texts.pop(0)
        written["content"] = "".join(texts)
        if message.tool_calls:
            written["tool_calls"] = [_written_call(call) for call in message.tool_calls]
        if message.call_id is not None:
            written["tool_call_id"] = message.call_id
        messages.append(written)
    return messages


def _written_call(call: ToolCall) -> dict[str, Any]:
    written = {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
    return written if call.id is None else {"id": call.id, **written}


def jinja_text(own: OwnFormat, messages: Sequence[Mapping[str, Any]], tools: list[Any], generation_prompt: bool) -> str:
    """The conversation in the tokenizer's own words. Raises `DataError` where the template refuses it."""
    if not messages:
        return ""
    try:
        text = own.tokenizer.apply_chat_template(
            list(messages), tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # a template may raise anything: TemplateError, but TypeError or KeyError as well
        raise DataError(
            f"chat template 'auto': this tokenizer's template refuses the conversation: {type(error).__name__}: {error}"
        ) from error
    return str(text)


def trained_spans(
    own: OwnFormat, conversation: Conversation, messages: list[dict[str, Any]], tools: list[Any], whole: str
) -> tuple[list[Span], str]:
    """Where the trained answers lie in `whole`, or why that is not certain.

    All of them, or the last alone where the template rewrites earlier ones.
    """
    turns = [k for k, message in enumerate(conversation.messages) if message.is_trained]
    marked = _marked_spans(own, messages, tools, whole) if own.blocks else None
    if marked is not None and all(k in marked for k in turns):
        return [marked[k] for k in turns], ""
    spans = [_span(own, messages, tools, k, whole) for k in turns]
    certain = [span for span in spans if not isinstance(span, str)]
    if len(certain) == len(spans):
        return certain, ""
    if certain and certain[-1] == spans[-1]:
        return certain[-1:], ""
    why = f"chat template 'auto': messages[{turns[-1]}] cannot be trained: {spans[-1]}; choose another template"
    return [], why


def _marked_spans(
    own: OwnFormat, messages: list[dict[str, Any]], tools: list[Any], whole: str
) -> dict[int, Span] | None:
    """By number of the message, what the template's generation blocks mark; None where they are not one an answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return {}
    try:
        rendered, marked = render_jinja_template(
            conversations=[messages],
            tools=tools or None,
            chat_template=own.tokenizer.get_chat_template(tools=tools or None),
            return_assistant_tokens_mask=True,
            **own.tokenizer.special_tokens_map,
        )
    except Exception:  # a template may raise anything, here where it is not asked for an answer
        return None
    if len(marked[0]) != len(answers) or not whole.startswith(rendered[0]):
        return None
    spans = (_closed(own, whole, start, stop) for start, stop in marked[0])
    return {k: span for k, span in zip(answers, spans, strict=True) if span}


def _closed(own: OwnFormat, whole: str, start: int, stop: int) -> Span | None:
    """A block from the end of the turn's prompt through the control token that ends the turn, in the block or next."""
    for end in range(start, min(stop, start + len(own.prompt)) + 1):
        if whole.endswith(own.prompt, 0, end):
            start = end
            break
    else:
        return None
    ends = list(own.special.finditer(whole, start, stop)) or list(own.added.finditer(whole, start, stop))
    if ends and not whole[ends[-1].end() : stop].strip():
        return start, ends[-1].end()
    after = own.special.match(whole, stop) or own.added.match(whole, stop)
    return (start, after.end()) if after else None


def _span(own: OwnFormat, messages: list[dict[str, Any]], tools: list[Any], k: int, whole: str) -> Span | str:
    """From the end of turn k's prompt to the control token that ends the turn, or why that is not certain."""
    if messages[k]["role"] != "assistant":
        return "'auto' can train the assistant's messages only"
    if k == 0:
        return "the conversation begins with it, and the template has no prompt for that"
    try:
        prompt = jinja_text(own, messages[:k], tools, True).rstrip(" ")
        upto = jinja_text(own, messages[: k + 1], tools, False)
    except DataError as error:
        return f"its prompt cannot be rendered alone ({error})"
    if not upto.startswith(prompt):
        return f"its prompt (…{prompt[-40:]!r}) is not a prefix of the template's text of the turn"
    answer = upto[len(prompt) :]
    ends = list(own.special.finditer(answer)) or list(own.added.finditer(answer))
    if not ends or answer[ends[-1].end() :].strip():
        return "the template ends it with no control token, so a model would not learn to stop"
    if "tool_calls" not in messages[k]:  # a text ends at the first: Phi-3-small writes <|end|>, then <|endoftext|>
        while len(ends) > 1 and not answer[ends[-2].end() : ends[-1].start()].strip():
            ends.pop()
    end = len(prompt) + ends[-1].end()
    if not whole.startswith(upto[:end]):
        return "the template writes it otherwise when other messages follow"
    return len(prompt), end


def _own_prompt(own: OwnFormat) -> str:
    """What the template writes to ask for an answer; empty where that cannot be told."""
    question = messages_of(QUESTION, mask=False)
    try:
        asked, told = (jinja_text(own, question, [], prompt) for prompt in (True, False))
    except DataError:
        return ""
    return asked[len(told) :].rstrip(" ") if asked.startswith(told) else ""


def _knows_tools(own: OwnFormat) -> bool:
    """Whether the template writes anything else when it is given a tool."""
    question = messages_of(QUESTION, mask=False)
    try:
        return jinja_text(own, question, [PROBE_TOOL], False) != jinja_text(own, question, [], False)
    except DataError:
        return False


def _any_of(spellings: Any) -> re.Pattern[str]:
    longest_first = sorted(set(spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

r"""MOSS: everything after a question is the model's to write, so its marks are part of what is trained.

    <|Human|>: question<eoh>\n
    <|Inner Thoughts|>: ...<eot>\n<|Commands|>: ...<eoc>\n     the model, which stops at <eoc>
    <|Results|>: ...<eor>\n                                    the runtime: never trained
    <|MOSS|>: answer<eom>\n                                    the model, which stops at <eom>

A message that has these marks already, as the data map `moss_sft` gives them, is written as it is, with the marks as
control tokens; any other answer is put between `<|MOSS|>: ` and `<eom>`. Tool calls and results become commands and
results (`_moss_tools`). https://github.com/OpenLMLab/MOSS.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

from mmft.errors import DataError
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Segment, Text
from mmft_plugins._moss_tools import ASSISTANT, MARKS, TOOL, commands, prepare, read_moss
from mmft_plugins._turn_templates import warn_of_missing

TOKENS = ("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>")


def render_moss(conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """Render MOSS's format; a prompt ends with the line break after a question or after results.

    Raises `DataError` for results of nothing that are not in MOSS's marks.
    """
    segments: list[Segment] = []
    for index, message in enumerate(prepare(conversation).messages):
        mark = partial(_written, loss=message.is_trained)
        if message.role == "system":
            end = "" if message.text.endswith("\n") else "\n"
            segments += [*_content(message), *mark(end)]
        elif message.role == "user":
            segments += [*mark("<|Human|>: "), *_content(message), *mark("<eoh>\n")]
        elif message.tool_calls:
            thoughts, body = commands(message)
            segments += [*mark("<|Inner Thoughts|>:"), Segment(thoughts, message.is_trained), *mark("<eot>\n")]
            segments += [*mark("<|Commands|>:"), Segment(body, message.is_trained), *mark("<eoc>")]
            segments.append(Segment("\n", markup=True))
        elif (
            found := None
            if message.images
            else (ASSISTANT if message.role == "assistant" else TOOL).fullmatch(message.text)
        ):
            segments += _marked(found, message.is_trained)
        elif message.role == "assistant":
            segments += [*mark("<|MOSS|>: "), *_content(message), *mark("<eom>"), Segment("\n", markup=True)]
        else:
            raise DataError(
                f"chat template 'moss_sft': messages[{index}] of role 'tool' is not MOSS's '<|Results|>: ...<eor>'; "
                "and answers no call; use the data map 'moss_sft', or a chat template with tools, such as 'chatml'"
            )
    return segments


def _marked(found: re.Match[str], loss: bool) -> list[Segment]:
    """A text in MOSS's own marks: they are markup, what stands between them is data, the last line break is context."""
    written = [group for group in found.groups() if group is not None]
    segments: list[Segment] = []
    for number in range(0, len(written), 4):
        mark, text, end, line_break = written[number : number + 4]
        segments += [*_written(mark, loss), Segment(text, loss), *_written(end, loss)]
        segments += _written(line_break, loss and number + 4 < len(written))
    return segments


def _written(text: str, loss: bool) -> list[Segment]:
    return [Segment(text, loss, markup=True)] if text else []


def _content(message: Message) -> list[Segment]:
    return [
        Segment(part) if isinstance(part, Image) else Segment(part.text, message.is_trained)
        for part in message.parts
        if part != Text("")
    ]


def bind_moss(tokenizer: Any) -> ChatTemplate:
    """The format for this tokenizer: nothing in it depends on one but the warning about missing control tokens."""
    warn_of_missing("moss_sft", TOKENS, tokenizer)
    return replace(MOSS, bind=None)


MOSS = ChatTemplate(
    name="moss_sft",
    render=render_moss,
    stop=("<eom>", "<eoc>"),
    supports_tools=True,
    read_calls=read_moss,
    call_marks=MARKS,
    source="https://github.com/OpenLMLab/MOSS/blob/main/README_en.md, the chat with plugins",
    bind=bind_moss,
)

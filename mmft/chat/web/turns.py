"""What a visitor said and what each model answered: kept in `gr.State`, shown in the chat areas, told to the models.

The chat area only shows it and is never read back. What is shown (everything) and what a model is told (the turns
that fit into its context) are two things, so that turns once dropped stay dropped and what was computed is used again.
"""

import logging
import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import reduce
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any

from mmft.chat.context import grouped
from mmft.chat.session import ChatSession, answer
from mmft.chat.tools import Toolbox, ToolUse
from mmft.chat.web.words import say
from mmft.errors import DataError, MmftError
from mmft.inference import Assistant, Generation, user_message
from mmft.memory import Memory
from mmft.types import Conversation, Message, Text

log = logging.getLogger("mmft")
MAX_CHARACTERS = 200_000  # of a question or a system text; tokenizing more would hold up everybody
MAX_TITLE = 60  # characters, of what a tool gave
# Between `<` and a letter, `&` and a letter, there is no tag and no entity. Unlike an escaped text it can be edited.
JOINER = "\u2060"


@dataclass(frozen=True, eq=False)
class Seat:
    """A model at the page: its name, the tools it may call, and the memory of whoever asked it last."""

    name: str
    assistant: Assistant
    tools: Toolbox = field(default_factory=Toolbox)
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class Style:
    """How a visitor wants to be answered."""

    system: str | None = None
    generation: Generation = field(default_factory=Generation)
    max_context: int | None = None
    language: str = "en"


@dataclass(frozen=True)
class Answer:
    """What came of a question: pieces, perhaps stopped early, or an error; before it begins, neither.

    `pieces` are texts and, where they happened, the uses of tools. `notice` is what the visitor should know: that the
    oldest turns no longer fit. `told` are the turns that a next question goes on from, this one the last; None while
    the answer grows, and where it was stopped.
    """

    pieces: tuple[str | ToolUse, ...] = ()
    error: str | None = None
    notice: str | None = None
    told: tuple[Message, ...] | None = None

    @property
    def text(self) -> str:
        """The texts, one after another."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))


@dataclass(frozen=True)
class Turn:
    """A question and the answer of every model to it."""

    text: str
    images: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = (Answer(),)

    def unanswered(self, seats: int, text: str | None = None, error: str | None = None) -> "Turn":
        """The question alone, with another text if one is given, or an error in the place of every answer."""
        return Turn(self.text if text is None else text, self.images, (Answer(error=error),) * seats)

    def messages(self, column: int) -> tuple[Message, ...]:
        """The question and all that a model said to it; nothing where there is no answer."""
        given = self.answers[column]
        if given.told:
            return tuple(grouped(given.told)[-1])
        return (user_message(self.text, self.images), answer(given.text)) if given.text else ()


def history(turns: Sequence[Turn], column: int = 0) -> tuple[Message, ...]:
    """What a model is told of earlier turns: those that were answered, from the oldest that was not dropped."""
    later: tuple[Message, ...] = ()
    for turn in reversed(turns):
        if told := turn.answers[column].told:
            return (*told, *later)
        later = (*turn.messages(column), *later)
    return later


def conversation(turns: Sequence[Turn], column: int, system: str | None, tools: Toolbox) -> Conversation:
    """All that was said to a model and by it, for a file."""
    first = (Message("system", (Text(system),)),) if system else ()
    return Conversation((*first, *(message for turn in turns for message in turn.messages(column))), tools.schemas)


def answered(
    seats: Sequence[Seat], style: Style, asked: Turn, turns: Sequence[Turn] = ()
) -> Generator[Turn, None, None]:
    """The turn while its answers grow, one model after the other, so that a seed gives each the same answer again."""
    yield asked
    for column, seat in enumerate(seats):
        with closing(_growing(seat, style, asked, history(turns, column))) as states:
            for state in states:
                answers = (*asked.answers[:column], state, *asked.answers[column + 1 :])
                yield replace(asked, answers=answers)
        asked = replace(asked, answers=answers)


def _growing(seat: Seat, style: Style, asked: Turn, earlier: tuple[Message, ...]) -> Generator[Answer, None, None]:
    """An answer while it grows; one that ends in an error says it and leaves nothing to the turns after it."""
    notices: list[str] = []
    pieces: list[str | ToolUse] = []
    session = ChatSession(
        seat.assistant, style.generation, style.system, earlier, memory=seat.memory, max_context=style.max_context,
        notify=notices.append, tools=seat.tools, tool_used=pieces.append,
    )  # fmt: skip
    try:
        for given in (asked.text, style.system or ""):
            if len(given) > MAX_CHARACTERS:
                raise DataError(say(style.language, "long", found=len(given), most=MAX_CHARACTERS))
        with closing(session.ask(asked.text, asked.images)) as stream:
            for piece in stream:
                before = pieces.pop() if pieces and isinstance(pieces[-1], str) else ""
                pieces.append(f"{before}{piece}")
                yield Answer(tuple(pieces), notice="; ".join(notices) or None)
        told = tuple(message for message in session.conversation.messages if message.role != "system")
        yield Answer(tuple(pieces), notice="; ".join(notices) or None, told=told)
    except MmftError as error:
        folders = {f"{Path(image).parent}/" for image in asked.images}  # of the server, and of no use to a visitor
        yield Answer(error=reduce(lambda text, folder: text.replace(folder, ""), folders, str(error)))
    except Exception as error:  # a bug of ours or a full GPU: the log has the traceback, the page stays usable
        log.exception("the question %r failed", asked.text)
        yield Answer(error=say(style.language, "bug", error=type(error).__name__))


def shown(turns: Sequence[Turn], column: int = 0, language: str = "en") -> list[dict[str, Any]]:
    """The turns as gradio's chat messages. Pictures of a question that was not answered go by their names.

    Pictures and text of a question are messages of their own: gradio 6.31 cannot edit a message of both.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        given = turn.answers[column]
        names = ", ".join(Path(image).name for image in turn.images)
        if turn.images and given.error is None:
            messages.append({"role": "user", "content": [{"path": image} for image in turn.images]})
        if turn.text or given.error is not None:
            messages.append({"role": "user", "content": [{"type": "text", "text": _inert(turn.text or names)}]})
        if given.error is not None:
            about = f" ({names})" if turn.text and names and names not in given.error else ""
            messages.append(_said(f"⚠ {say(language, 'not_answered')}{about}: {given.error}"))
        elif given.pieces or given.told:
            messages += [_said(f"({given.notice})")] if given.notice else []
            messages += [_said(p) if isinstance(p, str) else _used(p) for p in given.pieces or ("",)]
    return messages


def turn_at(turns: Sequence[Turn], place: int, column: int = 0) -> int | None:
    """The number of the turn that the message at a place among those of `shown` belongs to, or None."""
    return next((n for n in range(len(turns)) if 0 <= place < len(shown(turns[: n + 1], column))), None)


def edited(text: str) -> str:
    """What a visitor made of a question that `shown` has made inert."""
    return re.sub(f"([<&]){JOINER}", r"\1", text)


def _inert(text: str) -> str:
    return re.sub(r"([<&])(?=[A-Za-z/!?#])", rf"\1{JOINER}", text)


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [_text(text)]}


def _used(use: ToolUse) -> dict[str, Any]:
    """A block that folds: the tool's name and how its result begins, then what it was called with and what it gave."""
    arguments = "\n".join(f"{key}: {value}" for key, value in use.call.arguments.items())
    result = shorten(use.result, MAX_TITLE, placeholder=" …") or "…"
    title = f"{'⚠' if use.failed else '⚙'} {use.call.name} → {result}"
    return {**_said(f"{arguments}\n→ {use.result}".lstrip("\n")), "metadata": {"title": _inert(title)}}


def _text(text: str) -> dict[str, str]:
    """Escaped, because gradio 6.31 puts a message into the page as HTML even with `render_markdown=False`.

    A plain string instead of this dict would lose its indentation to `inspect.cleandoc`.
    """
    return {"type": "text", "text": escape(text, quote=False)}

"""A conversation with a model: what has been said, and the next answer as it is written.

Terminal, page and server all ask through `ChatSession`, which builds the messages the data maps build, so that a
question here has the form of a question in training. With tools an answer may take several rounds: the model calls, is
told the results, and goes on.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmft.chat.context import fitted
from mmft.chat.tools import CallReader, Toolbox, ToolUse
from mmft.errors import DataError
from mmft.images import open_image
from mmft.inference import Assistant, Generation, user_message
from mmft.memory import Memory, Usage
from mmft.types import Conversation, Message, Text, ToolCall

log = logging.getLogger("mmft")
MAX_PICTURE_BYTES = 50_000_000
MAX_ROUNDS = 5  # of calls in one answer
NO_ANSWER = f"[no answer: {MAX_ROUNDS} rounds of tool calls are the limit]"


@dataclass
class _Round:
    """One pass of the model: what the user saw of it, and at its end what is kept of it."""

    shown: str = ""
    said: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass
class _Turn:
    """A question and what has followed it; `turns` are those before it that the context has room for."""

    asked: Message
    turns: Sequence[Message]
    after: list[Message] = field(default_factory=list)
    shown: str = ""  # in all rounds so far

    def ended(self, answer: Message) -> tuple[Message, ...]:
        """The turns with this one and its answer."""
        return (*self.turns, self.asked, *self.after, answer)


class ChatSession:
    """One conversation. It grows by a question and its answer, both or neither.

    `system` is the system text; None leaves it to the template. `history` are the turns to go on from, without system.
    `memory` may be shared by sessions that ask one after another: what a prompt shares with the one before, whosever it
    was, is not run again. `max_context` are the tokens of prompt and answer, at most those the model has positions for;
    where they are used up, the oldest turns are dropped and `notify` is told. `tools`, which may be changed between two
    questions, are what the model may call; `tool_used` is told of each call, in the thread that reads the answer.
    """

    def __init__(
        self,
        assistant: Assistant,
        generation: Generation | None = None,
        system: str | None = None,
        history: Sequence[Message] = (),
        *,
        memory: Memory | None = None,
        max_context: int | None = None,
        notify: Callable[[str], None] = log.warning,
        tools: Toolbox | None = None,
        tool_used: Callable[[ToolUse], None] = lambda use: None,
    ) -> None:
        self.generation = generation or Generation()
        self.system = system
        self.tools = tools or Toolbox()
        self._assistant, self._turns, self._notify = assistant, tuple(history), notify
        self._memory, self.tool_used = memory or Memory(), tool_used
        limits = [limit for limit in (max_context, assistant.max_context) if limit is not None]
        self._max_context = min(limits, default=None)

    @property
    def conversation(self) -> Conversation:
        """What has been said, the system text first, and the tools that are enabled."""
        return Conversation((*self._system(), *self._turns), self.tools.schemas)

    @property
    def usage(self) -> Usage | None:
        """The tokens of the last answer (with tools: of its last round), and why it ended."""
        return self._memory.usage

    def reset(self, history: Sequence[Message] = ()) -> None:
        """Forget every turn, or go on from others; the system text stays."""
        self._turns = tuple(history)

    def ask(self, text: str, images: Sequence[str | Path] = ()) -> Generator[str, None, None]:
        """The answer in pieces, without calls. Everything is checked here, before the model runs and the first piece.

        Closing the iterator (or Ctrl-C) stops the model and keeps the answer as far as it got; where it had not begun,
        and after an error, the conversation is as it was before. Of an answer that ends in the middle of its calls,
        what was said before them is kept.
        Raises `DataError` for a picture that cannot be read, a text model given one, an empty question, or one that is
        longer than the context.
        """
        asked = user_message(text, images)
        check_images(self._assistant, images)
        turn = _Turn(asked, self._turns)
        return self._answer(turn, self._fitted(turn))

    def _answer(self, turn: _Turn, generation: Generation) -> Generator[str, None, None]:
        number, passed = 0, _Round()
        try:
            while True:
                passed = _Round()
                yield from self._round(turn, generation, passed)
                if not passed.calls:
                    break
                if number == MAX_ROUNDS:
                    passed.said = f"{passed.shown}\n\n{NO_ANSWER}".lstrip()
                    yield passed.said.removeprefix(passed.shown)
                    break
                number += 1
                self._use_tools(turn, passed)
                generation = self._fitted(turn)
                if passed.shown and not passed.shown.endswith("\n"):
                    yield "\n"
        except (GeneratorExit, KeyboardInterrupt):
            if passed.shown and not passed.calls:
                self._turns = turn.ended(answer(passed.shown))
            elif turn.shown.strip():
                turn.after.clear()
                self._turns = turn.ended(answer(turn.shown.strip()))
            raise
        self._turns = turn.ended(answer(passed.said))

    def _round(self, turn: _Turn, generation: Generation, passed: _Round) -> Generator[str, None, None]:
        """What the model writes next, and at its end its calls."""
        messages = (*self._system(), *turn.turns, turn.asked, *turn.after)
        so_far = Conversation(messages, self.tools.schemas)
        reader = CallReader(self._assistant.template) if self.tools else None
        stream = self._assistant.stream(so_far, generation, self._memory, marks=reader is not None)
        with closing(stream) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if shown := reader.take(piece) if reader else piece:
                    passed.shown, turn.shown = passed.shown + shown, turn.shown + shown
                    yield shown
        passed.said = passed.shown
        if reader:
            rest, passed.said, passed.calls = reader.end()
            passed.shown, turn.shown = passed.shown + rest, turn.shown + rest
            if rest:
                yield rest

    def _use_tools(self, turn: _Turn, passed: _Round) -> None:
        """Run the calls of a round, one after another, and put them and their results into the turn."""
        results = []
        for call in passed.calls:
            use = self.tools.use(call)
            results.append(Message("tool", (Text(use.result),), call_id=call.id))
            if call.name:
                self.tool_used(use)
        said = (Text(passed.said),) if passed.said else ()
        turn.after += [Message("assistant", said, passed.calls), *results]

    def _fitted(self, turn: _Turn) -> Generation:
        """Drop the oldest turns where the context is full; how the next round is drawn."""
        system, wanted, limit = self._system(), self.generation.max_new_tokens, self._max_context
        tools = self.tools.schemas
        fit = fitted(self._assistant, system, turn.turns, turn.asked, wanted, limit, after=turn.after, tools=tools)
        if fit.dropped:
            turns = "the oldest turn was" if fit.dropped == 1 else f"the {fit.dropped} oldest turns were"
            self._notify(f"the context of {self._max_context:,} tokens is full: {turns} dropped")
        turn.turns = fit.turns
        return replace(self.generation, max_new_tokens=fit.max_new_tokens)

    def _system(self) -> tuple[Message, ...]:
        return (Message("system", (Text(self.system),)),) if self.system else ()


def answer(text: str) -> Message:
    """The assistant's turn."""
    return Message("assistant", (Text(text),))


def check_images(assistant: Assistant, images: Sequence[str | Path]) -> None:
    """Open every picture once. Raises `DataError` for one that is not readable, or where the model takes none."""
    if images and not assistant.sees:
        raise DataError(f"{images[0]}: this is a text model, it takes no pictures; train one with model.vision to ask")
    for image in images:
        path = Path(image)
        if path.is_file() and (size := path.stat().st_size) > MAX_PICTURE_BYTES:
            raise DataError(f"{path}: {size:,} bytes; a picture of at most {MAX_PICTURE_BYTES:,} is taken")
        open_image(path)

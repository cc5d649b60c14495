"""A conversation with a model: what has been said, and the next answer as it is written.

Terminal, page and server all ask through `ChatSession`, which builds the messages the data maps build, so that a
question here has the form of a question in training.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from mmft.chat.context import fitted
from mmft.errors import DataError
from mmft.images import open_image
from mmft.inference import Assistant, Generation, user_message
from mmft.memory import Memory, Usage
from mmft.types import Conversation, Message, Text

log = logging.getLogger("mmft")
MAX_PICTURE_BYTES = 50_000_000


class ChatSession:
    """One conversation. It grows by a question and its answer, both or neither.

    `system` is the system text; None leaves it to the template. `history` are the turns to go on from, without system.
    `memory` may be shared by sessions that ask one after another: what a prompt shares with the one before, whosever it
    was, is not run again. `max_context` are the tokens of prompt and answer, at most those the model has positions for;
    where they are used up, the oldest turns are dropped and `notify` is told.
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
    ) -> None:
        self.generation = generation or Generation()
        self.system = system
        self._assistant, self._turns, self._notify = assistant, tuple(history), notify
        self._memory = memory or Memory()
        limits = [limit for limit in (max_context, assistant.max_context) if limit is not None]
        self._max_context = min(limits, default=None)

    @property
    def conversation(self) -> Conversation:
        """What has been said, the system text first."""
        system = (Message("system", (Text(self.system),)),) if self.system else ()
        return Conversation((*system, *self._turns))

    @property
    def usage(self) -> Usage | None:
        """The tokens of the last answer, and why it ended."""
        return self._memory.usage

    def reset(self, history: Sequence[Message] = ()) -> None:
        """Forget every turn, or go on from others; the system text stays."""
        self._turns = tuple(history)

    def ask(self, text: str, images: Sequence[str | Path] = ()) -> Generator[str, None, None]:
        """The answer in pieces. Everything is checked here, before the model runs and before the first piece.

        Closing the iterator (or Ctrl-C) stops the model and keeps the answer as far as it got; where it had not begun,
        and after an error, the conversation is as it was before.
        Raises `DataError` for a picture that cannot be read, a text model given one, an empty question, or one that is
        longer than the context.
        """
        asked = user_message(text, images)
        check_images(self._assistant, images)
        system = self.conversation.messages[: 1 if self.system else 0]
        fit = fitted(self._assistant, system, self._turns, asked, self.generation.max_new_tokens, self._max_context)
        if fit.dropped:
            turns = "the oldest turn was" if fit.dropped == 1 else f"the {fit.dropped} oldest turns were"
            self._notify(f"the context of {self._max_context:,} tokens is full: {turns} dropped")
        generation = replace(self.generation, max_new_tokens=fit.max_new_tokens)
        return self._answer(system, fit.turns, asked, generation)

    def _answer(
        self, system: Sequence[Message], turns: Sequence[Message], asked: Message, generation: Generation
    ) -> Generator[str, None, None]:
        pieces: list[str] = []
        so_far = Conversation((*system, *turns, asked))
        try:
            with closing(self._assistant.stream(so_far, generation, self._memory)) as stream:  # type: ignore[type-var]
                for piece in stream:
                    pieces.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if pieces:
                self._turns = (*turns, asked, answer("".join(pieces)))
            raise
        self._turns = (*turns, asked, answer("".join(pieces)))


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

"""A conversation with a model: what has been said, and the next answer as it is written.

Terminal and page both ask through `ChatSession`, which builds the messages the data maps build, so that a question
here has the form of a question in training.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from mmft.errors import DataError
from mmft.images import open_image
from mmft.inference import Assistant, Generation, user_message
from mmft.types import Conversation, Message, Text


class ChatSession:
    """One conversation. It grows by a question and its answer, both or neither.

    `system` is the system text; None leaves it to the template. `history` are the turns to go on from, without system.
    """

    def __init__(
        self,
        assistant: Assistant,
        generation: Generation | None = None,
        system: str | None = None,
        history: Sequence[Message] = (),
    ) -> None:
        self._assistant, self._generation = assistant, generation or Generation()
        self._system = (Message("system", (Text(system),)),) if system else ()
        self._turns = tuple(history)

    @property
    def conversation(self) -> Conversation:
        """What has been said, the system text first."""
        return Conversation((*self._system, *self._turns))

    def reset(self) -> None:
        """Forget every turn; the system text stays."""
        self._turns = ()

    def ask(self, text: str, images: Sequence[str | Path] = ()) -> Generator[str, None, None]:
        """The answer in pieces. Everything is checked here, before the model runs and before the first piece.

        Closing the iterator (or Ctrl-C) stops the model and keeps the answer as far as it got; where it had not begun,
        and after an error, the conversation is as it was before.
        Raises `DataError` for a picture that cannot be read, a text model given one, or an empty question.
        """
        asked = user_message(text, images)
        check_images(self._assistant, images)
        return self._answer(asked)

    def _answer(self, asked: Message) -> Generator[str, None, None]:
        pieces: list[str] = []
        so_far = Conversation((*self.conversation.messages, asked))
        try:
            with closing(self._assistant.stream(so_far, self._generation)) as stream:  # type: ignore[type-var]
                for piece in stream:
                    pieces.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if pieces:
                self._turns += (asked, answer("".join(pieces)))
            raise
        self._turns += (asked, answer("".join(pieces)))


def answer(text: str) -> Message:
    """The assistant's turn."""
    return Message("assistant", (Text(text),))


def check_images(assistant: Assistant, images: Sequence[str | Path]) -> None:
    """Open every picture once. Raises `DataError` for one that is not readable, or where the model takes none."""
    if images and not assistant.sees:
        raise DataError(f"{images[0]}: this is a text model, it takes no pictures; train one with model.vision to ask")
    for image in images:
        open_image(image)

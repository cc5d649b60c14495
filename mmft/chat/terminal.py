"""Chat in a terminal, or with a pipe. Answers go to stdout and everything else to stderr."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path

from mmft.chat.session import ChatSession, check_images
from mmft.errors import MmftError
from mmft.inference import Assistant, Generation

PROMPT = "> "
GREETING = "Enter sends, Ctrl-C stops an answer, Ctrl-D ends. /help lists the commands."
HELP = """\
/image PATH   attach a picture to the next question; may be repeated
/reset, RESET forget the conversation; the pictures of --image are attached again
/exit, EXIT   end (also Ctrl-D)
/help         this list"""
# A model or a question may spell escape sequences; only what moves no cursor and sets no title reaches the screen.
INVISIBLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run_terminal(
    assistant: Assistant,
    generation: Generation | None = None,
    *,
    images: Sequence[Path] = (),
    message: str | None = None,
    system: str | None = None,
) -> int:
    """Ask `message` and end, or chat until the user ends it; returns the exit code.

    Where stdin is no terminal, each of its lines is a question, and the code is 2 if one of them had no answer.
    Raises `DataError` for a picture of `images` that cannot be read, and in one-shot mode for whatever is wrong.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # a byte that is no UTF-8 is an error of its question, not of the chat
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    chat = _Chat(ChatSession(assistant, generation, system), assistant, images)
    if message is not None:
        chat.ask(message)
        return 0
    check_images(assistant, images)
    if not sys.stdin.isatty():
        failed = sum(not chat.take(line.rstrip("\r\n")) for line in chat.lines(sys.stdin))
        return 2 if failed else 0
    import readline  # noqa: F401  line editing and history for input()

    _note(GREETING)
    for line in chat.lines(_typed()):
        chat.take(line, interactive=True)
    return 0


def _typed() -> Iterator[str]:
    """Lines from the keyboard, until Ctrl-D, or Ctrl-C at the prompt."""
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            _note("")
            return


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


class _Chat:
    """A session with the pictures that wait for the next question, and the commands."""

    def __init__(self, session: ChatSession, assistant: Assistant, images: Sequence[Path]) -> None:
        self._session, self._assistant, self._first = session, assistant, tuple(images)
        self._waiting = list(images)

    def lines(self, source: Iterator[str]) -> Iterator[str]:
        """The lines that say something, up to EXIT."""
        for line in source:
            if line.strip() in ("EXIT", "/exit"):
                return
            if line.strip():
                yield line

    def take(self, line: str, *, interactive: bool = False) -> bool:
        """Do what a line says; an error is one line on stderr. Returns whether there was none."""
        word, _, rest = line.strip().partition(" ")
        commands: dict[str, Callable[[], None]] = {
            "/reset": self._reset, "RESET": self._reset, "/help": lambda: _note(HELP)
        }  # fmt: skip
        try:
            if word == "/image":
                self._attach(rest.strip())
            elif line.strip() in commands:
                commands[line.strip()]()
            elif not rest and word.startswith("/") and word[1:].isalpha():
                raise MmftError(f"no command {word}; there are /image, /reset, /exit and /help")
            else:
                self.ask(line)
        except MmftError as error:
            _note(f"error: {error}")
            return False
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note("\n(stopped)")
        return True

    def ask(self, text: str) -> None:
        """Write the answer to stdout while it is made. The waiting pictures are used up, whatever comes of it."""
        images, self._waiting = self._waiting, []
        clean, written = sys.stdout.isatty(), False
        try:
            with closing(self._session.ask(text, images)) as pieces:
                for piece in pieces:
                    written = True
                    sys.stdout.write(piece.translate(INVISIBLE) if clean else piece)
                    sys.stdout.flush()
                written = True
        finally:
            if written:
                sys.stdout.write("\n")
                sys.stdout.flush()

    def _reset(self) -> None:
        self._session.reset()
        self._waiting = list(self._first)
        _note("the conversation is forgotten" + (f"; {_attached(self._waiting)}" if self._waiting else ""))

    def _attach(self, path: str) -> None:
        """Check a picture now, while its path is on the screen."""
        if not path:
            raise MmftError("/image needs the path of a picture")
        image = Path(path.strip("'\"")).expanduser()
        check_images(self._assistant, [image])
        self._waiting.append(image)
        _note(_attached(self._waiting))


def _attached(images: Sequence[Path]) -> str:
    return f"with the next question: {', '.join(image.name for image in images)}"

"""Chat in a terminal, or with a pipe. Answers go to stdout and everything else to stderr."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path

from mmft.chat.commands import Talk
from mmft.chat.keyboard import Keyboard
from mmft.chat.session import ChatSession, check_images
from mmft.chat.tools import ToolUse, toolbox
from mmft.errors import MmftError
from mmft.inference import Assistant, Generation
from mmft.plugins import Plugins

GREETING = "{} sends, Alt+Enter makes a new line, Ctrl-C stops an answer, Ctrl-D ends. /help lists the commands."
# A model or a question may spell escape sequences; only what moves no cursor and sets no title reaches the screen.
INVISIBLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
FAILED, CLOSED = 2, 141  # exit codes: something had no answer; nobody reads stdout any more (128 + SIGPIPE)


def run_terminal(
    assistant: Assistant,
    generation: Generation | None = None,
    *,
    images: Sequence[Path] = (),
    message: str | None = None,
    system: str | None = None,
    max_context: int | None = None,
    as_json: bool = False,
    multiline: bool = False,
    tools: Sequence[str] = (),
    plugins: Plugins | None = None,
) -> int:
    """Ask `message` and end, or chat until the user ends it; returns the exit code.

    `message="-"` is all of stdin. Without a message, where stdin is no terminal, each of its lines is a question, and
    the code is 2 if one of them had no answer. `as_json` writes each answer, or why there is none, as one line of JSON.
    `tools` are names of tools of `plugins` that the model may call; each call and its result is a line on stderr.
    Raises `DataError` for a picture of `images` that cannot be read, and in one-shot mode for whatever is wrong.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # a byte that is no UTF-8 is an error of its question, not of the chat
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    plugins = plugins or Plugins(())
    box = toolbox(tools, plugins, assistant.template)
    for name, reason in box.left_out.items():
        note(f"tool {name!r} is left out: {reason}")
    session = ChatSession(assistant, generation, system, max_context=max_context, notify=note, tools=box)
    pages = _JsonLines(session) if as_json else _Screen(session)
    session.tool_used = pages.tool_used
    talk = Talk(session, assistant, images, ask=pages.ask, note=note, plugins=plugins)
    try:
        if message is not None:
            talk.ask(sys.stdin.read().rstrip("\r\n") if message == "-" else message)
            return 0
        check_images(assistant, images)
        if sys.stdin.isatty():
            _by_hand(talk, multiline)
            return 0
        answered = [_taken(talk, line.rstrip("\r\n")) for line in talk.lines(iter(sys.stdin))]
        return 0 if all(answered) else FAILED
    except BrokenPipeError:  # `mmft chat ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return CLOSED


def note(text: str) -> None:
    """A line for the user, on stderr."""
    print(_plain(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)  # noqa: T201


def _by_hand(talk: Talk, multiline: bool) -> None:
    keyboard = Keyboard([*talk.commands, "RESET", "EXIT"], talk.takes_path, multiline=multiline)
    note(GREETING.format("An empty line" if multiline else "Enter"))
    for line in talk.lines(keyboard.questions(note)):
        try:
            _taken(talk, line)
        except KeyboardInterrupt:
            note("\n(stopped)")


def _taken(talk: Talk, line: str) -> bool:
    """Do what a line says; an error is one line on stderr. Returns whether there was none."""
    try:
        talk.take(line)
    except MmftError as error:
        note(f"error: {error}")
        return False
    return True


class _Screen:
    """Answers as text, while they are made."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._open = False  # a line of the answer is on the screen and not ended

    def tool_used(self, use: ToolUse) -> None:
        """A call and its result, on a line of its own."""
        if self._open and sys.stdout.isatty():
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._open = False
        note(f"[{use}]")

    def ask(self, text: str, images: Sequence[Path]) -> None:
        """Write the answer and a line's end."""
        at_terminal, written = sys.stdout.isatty(), False
        try:
            with closing(self._session.ask(text, images)) as pieces:
                for piece in pieces:
                    written, self._open = True, not piece.endswith("\n")
                    sys.stdout.write(_plain(piece) if at_terminal else piece)
                    sys.stdout.flush()
                written = True
        finally:
            if written:
                sys.stdout.write("\n")
                sys.stdout.flush()
        usage = self._session.usage
        if usage and usage.finish == "length":
            note(f"(cut off after {usage.answer_tokens:,} tokens; see --max-new-tokens and /params)")


class _JsonLines:
    """Each answer as one line of JSON, with what it cost."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._uses: list[ToolUse] = []

    def tool_used(self, use: ToolUse) -> None:
        """For `tool_calls` of the line."""
        self._uses.append(use)

    def ask(self, text: str, images: Sequence[Path]) -> None:
        """Write `{"answer", "finish", "prompt_tokens", "reused_tokens", "answer_tokens"}`, or `{"error"}`.

        With tools also `tool_calls`; the numbers are then of the last round.
        """
        self._uses = []
        try:
            written = "".join(self._session.ask(text, images))
        except MmftError as error:
            self._write({"error": str(error)})
            raise
        usage = self._session.usage
        assert usage is not None
        counts = {name: getattr(usage, name) for name in ("prompt_tokens", "reused_tokens", "answer_tokens")}
        calls = {"tool_calls": [_as_dict(use) for use in self._uses]} if self._session.tools else {}
        self._write({"answer": written, "finish": usage.finish, **calls, **counts})

    def _write(self, content: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _as_dict(use: ToolUse) -> dict[str, object]:
    arguments = dict(use.call.arguments)
    return {"name": use.call.name, "arguments": arguments, "result": use.result, "failed": use.failed}


def _plain(text: str) -> str:
    return text.translate(INVISIBLE)

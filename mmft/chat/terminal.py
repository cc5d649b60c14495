"""Chat in a terminal, or with a pipe. Answers go to stdout and everything else to stderr."""

import json
import logging
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

log = logging.getLogger("mmft")
GREETING = "{} sends, Alt+Enter makes a new line, Ctrl-C stops an answer, Ctrl-D ends."
HELP = " /help lists the commands."
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
    commands: bool = True,
    tools: Sequence[str] = (),
    plugins: Plugins | None = None,
) -> int:
    """Ask `message` and end, or chat until the user ends it; returns the exit code.

    `message="-"` is all of stdin. Without a message, where stdin is no terminal, each of its lines is a question, and
    the code is 2 if one of them had no answer. `as_json` writes each answer, or what failed, as one line of JSON.
    Without `commands` every line is a question, so that none of a file of data can write a file or end the chat.
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
    talk = Talk(session, assistant, images, ask=pages.ask, note=note, plugins=plugins, commands=commands)
    try:
        if message is not None:
            _ask_once(talk, pages, message)
            return 0
        check_images(assistant, images)
        if sys.stdin.isatty():
            _by_hand(talk, pages, multiline)
            return 0
        answered = [_taken(talk, pages, line.rstrip("\r\n")) for line in talk.lines(iter(sys.stdin))]
        return 0 if all(answered) else FAILED
    except BrokenPipeError:  # `mmft chat ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return CLOSED


def note(text: str) -> None:
    """A line for the user, on stderr."""
    print(_plain(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)  # noqa: T201


def _ask_once(talk: Talk, pages: "_Screen | _JsonLines", message: str) -> None:
    try:
        talk.ask(sys.stdin.read().rstrip("\r\n") if message == "-" else message)
    except MmftError as error:
        pages.failed(str(error))
        raise


def _by_hand(talk: Talk, pages: "_Screen | _JsonLines", multiline: bool) -> None:
    words = [*talk.commands, "RESET", "EXIT"] if talk.commands else []
    keyboard = Keyboard(words, talk.takes_path, multiline=multiline)
    note(GREETING.format("An empty line" if multiline else "Enter") + (HELP if talk.commands else ""))
    for line in talk.lines(keyboard.questions(note)):
        try:
            _taken(talk, pages, line)
        except KeyboardInterrupt:
            note("\n(stopped)")


def _taken(talk: Talk, pages: "_Screen | _JsonLines", line: str) -> bool:
    """Do what a line says; an error is one line on stderr. Returns whether there was none."""
    try:
        talk.take(line)
        return True
    except BrokenPipeError:
        raise
    except MmftError as error:
        told = str(error)
    except Exception as error:  # a bug of ours or a full GPU: the log has the traceback, the conversation stays
        log.exception("a line of the chat failed")
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    note(f"error: {told}")
    pages.failed(told)
    return False


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

    def failed(self, problem: str) -> None:
        """Nothing: an error is a line on stderr."""

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

    def failed(self, problem: str) -> None:
        """A line `{"error"}`, for a command that failed too."""
        self._write({"error": problem})

    def ask(self, text: str, images: Sequence[Path]) -> None:
        """Write `{"answer", "finish", "prompt_tokens", "reused_tokens", "answer_tokens"}`.

        With tools also `tool_calls`; the numbers are then of the last round.
        """
        self._uses = []
        written = "".join(self._session.ask(text, images))
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

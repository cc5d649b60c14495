"""Questions from a keyboard: line editing, history, completion, several lines in one question.

prompt-toolkit does the work and writes to stderr, so stdout holds answers only. Where it is not installed, or stderr is
no terminal, lines are read plainly.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, MORE = "> ", ". "


class Keyboard:
    """What a person types. With `multiline` a question ends with an empty line, else with Enter.

    Alt+Enter makes a new line in either mode, and pasted lines stay together. `commands` are completed, and sent at the
    first Enter; `takes_path` says which of them are followed by a path.
    """

    def __init__(self, commands: Iterable[str], takes_path: Callable[[str], bool], *, multiline: bool = False) -> None:
        self.multiline = multiline
        self._commands, self._takes_path = sorted(commands), takes_path

    def questions(self, note: Callable[[str], None]) -> Iterator[str]:
        """Until Ctrl-D, or Ctrl-C at the prompt."""
        if not sys.stderr.isatty() or find_spec("prompt_toolkit") is None:
            if sys.stderr.isatty():
                note("for line editing and history: pip install prompt-toolkit")
            read: Callable[[], str] = self._plain
        else:
            session = self._session()
            read = lambda: session.prompt(PROMPT)  # noqa: E731
        while True:
            try:
                yield read()
            except (EOFError, KeyboardInterrupt):
                note("")
                return

    def is_command(self, text: str) -> bool:
        """Whether a text is one line that begins as a command does."""
        return "\n" not in text and text.split(" ")[0] in self._commands

    def _plain(self) -> str:
        """A question from stdin; the prompt goes to stderr."""
        lines: list[str] = []
        while True:
            print(MORE if lines else PROMPT, end="", file=sys.stderr, flush=True)  # noqa: T201
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            line = line.rstrip("\r\n")
            if not self.multiline or (not lines and self.is_command(line)):
                return line
            if not line and lines:
                return "\n".join(lines)
            lines += [line] if line or lines else []

    def _session(self) -> "PromptSession[str]":
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        return PromptSession(
            history=_history(),
            output=create_output(stdout=sys.stderr),
            key_bindings=self._keys(),
            completer=self._completer(),
            complete_while_typing=False,
            multiline=True,  # our own keys say what Enter does
            prompt_continuation=MORE,
            enable_open_in_editor=True,
        )

    def _keys(self) -> "KeyBindings":
        from prompt_toolkit.filters import has_completions
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("enter", filter=~has_completions)
        def enter(event: "KeyPressEvent") -> None:
            buffer = event.current_buffer
            done = not self.multiline or self.is_command(buffer.text)
            if done or (buffer.text.strip() and not buffer.document.current_line):
                if not done:
                    buffer.text = buffer.text.rstrip("\n")
                buffer.validate_and_handle()
            else:
                buffer.insert_text("\n")

        @keys.add("escape", "enter")
        def new_line(event: "KeyPressEvent") -> None:
            event.current_buffer.insert_text("\n")

        return keys

    def _completer(self) -> "Completer":
        from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
        from prompt_toolkit.document import Document

        words, paths = WordCompleter(self._commands, sentence=True), PathCompleter(expanduser=True)
        takes_path = self._takes_path

        class Commands(Completer):
            def get_completions(self, document: Any, complete_event: Any) -> "Iterable[Completion]":
                command, space, path = document.text_before_cursor.partition(" ")
                if space and takes_path(command):
                    return paths.get_completions(Document(path), complete_event)
                return words.get_completions(document, complete_event) if command.startswith("/") else ()

        return Commands()


def _history() -> "History":
    """Of earlier chats, in a file that nobody else may read; of this one alone where there is no place for a file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mmft"
        home.mkdir(parents=True, exist_ok=True)
        path = home / "chat_history"
        path.touch(mode=0o600)
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return FileHistory(str(path))

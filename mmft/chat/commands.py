"""What a line of the chat says: a command, or a question for the model with the pictures that wait for it."""

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mmft.chat.session import ChatSession, check_images
from mmft.chat.tools import tool_names, toolbox
from mmft.chat.transcript import read_transcript, write_transcript
from mmft.errors import MmftError, did_you_mean
from mmft.inference import Assistant, Generation, user_message
from mmft.plugins import Plugins
from mmft.types import Conversation, Message, Text

EXIT = ("EXIT", "/exit")
NUMBERS = {int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what follows its name, what it does, and the function that does it."""

    argument: str
    summary: str
    run: Callable[[str], None]


class Talk:
    """A session, the pictures for its next question, and its commands.

    `ask` is given a question and its pictures and writes the answer; `note` tells the user everything else. `plugins`
    have the tools that `/tools` chooses from. Without `commands` there are none, and every line is a question.
    """

    def __init__(
        self,
        session: ChatSession,
        assistant: Assistant,
        images: Sequence[Path],
        *,
        ask: Callable[[str, Sequence[Path]], None],
        note: Callable[[str], None],
        plugins: Plugins | None = None,
        commands: bool = True,
    ) -> None:
        self._session, self._assistant, self._first = session, assistant, tuple(images)
        self._ask, self._note, self._plugins = ask, note, plugins or Plugins(())
        self._waiting = list(images)
        self.commands = self._commands() if commands else {}

    def _commands(self) -> dict[str, Command]:
        again = "; the pictures of --image are attached again"
        return {
            "/image": Command("PATH", "attach a picture to the next question; may be repeated", self._attach),
            "/reset": Command("", f"forget the conversation (also RESET){again}", self._reset),
            "/system": Command("[TEXT]", "set the system text, or show it; - leaves it to the template", self._system),
            "/params": Command("[NAME=VALUE ...]", "set how answers are drawn, or show it", self._params),
            "/tools": Command(
                "[NAME ...]", "choose what the model may call (all, or - for none), or show it", self._tools
            ),
            "/save": Command("PATH", "write the conversation into a file", self._save),
            "/load": Command("PATH", "go on with the conversation of such a file", self._load),
            "/help": Command("", "this list", self._help),
            "/exit": Command("", "end (also EXIT, Ctrl-D)", lambda _: None),  # `lines` ends there
        }

    def lines(self, source: Iterator[str]) -> Iterator[str]:
        """The lines that say something, up to EXIT."""
        for line in source:
            if self.commands and line.strip() in EXIT:
                return
            if line.strip():
                yield line

    def take(self, line: str) -> None:
        """Do what a line says. Raises `MmftError` where that cannot be done."""
        if not self.commands:
            self.ask(line)
            return
        word, _, rest = line.strip().partition(" ")
        word = "/reset" if line.strip() == "RESET" else word
        if command := self.commands.get(word):
            command.run(rest.strip())
            return
        if word.startswith("/") and word[1:].isalpha() and (not rest or did_you_mean(word, self.commands)):
            raise MmftError(f"no command {word}; there are {', '.join(self.commands)}")
        self.ask(line)

    def ask(self, text: str) -> None:
        """Ask with the waiting pictures, which are used up, whatever comes of it."""
        images, self._waiting = self._waiting, []
        self._ask(text, images)

    def takes_path(self, command: str) -> bool:
        """Whether a path follows it."""
        return command in self.commands and self.commands[command].argument == "PATH"

    def _help(self, _: str) -> None:
        rows = [(f"{name} {command.argument}".strip(), command.summary) for name, command in self.commands.items()]
        width = max(len(usage) for usage, _ in rows)
        self._note("\n".join(f"{usage.ljust(width)}  {summary}" for usage, summary in rows))

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._waiting = list(self._first)
        self._note("the conversation is forgotten" + (f"; {_attached(self._waiting)}" if self._waiting else ""))

    def _attach(self, path: str) -> None:
        """Check a picture now, while its path is on the screen."""
        image = _path("/image", path)
        check_images(self._assistant, [image])
        self._waiting.append(image)
        self._note(_attached(self._waiting))

    def _system(self, text: str) -> None:
        if text:
            self._session.system = None if text == "-" else text
        self._note(f"system text: {self._session.system or 'that of the template'}")

    def _params(self, text: str) -> None:
        if text:
            self._session.generation = changed(self._session.generation, text.split())
        self._note(
            "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(self._session.generation).items() if k != "stop")
        )

    def _tools(self, text: str) -> None:
        """Choose tools, and show all there are."""
        if text:
            names = tool_names("" if text == "-" else text)
            self._session.tools = toolbox(names, self._plugins, self._assistant.template)
        enabled = self._session.tools.names
        rows = []
        for tool in self._plugins.tools:
            reason = tool.unavailable()
            state = "on " if tool.name in enabled else "off"
            rows.append(f"{state}  {tool.name}: {reason or tool.summary or tool.description}")
        self._note("\n".join(rows) or "no plugin offers a tool")

    def _save(self, path: str) -> None:
        target = _path("/save", path)
        write_transcript(target, self._session.conversation)
        self._note(f"saved to {target}")

    def _load(self, path: str) -> None:
        conversation = read_transcript(_path("/load", path))
        check_images(self._assistant, [image.source for image in conversation.images])
        system = [message for message in conversation.messages if message.role == "system"]
        turns = [message for message in conversation.messages if message.role != "system"]
        text = "\n".join(message.text for message in system) or None
        first = (Message("system", (Text(text),)),) if text else ()
        tools = self._session.tools.schemas
        # Raises where no question could follow, as of roles that the template does not take.
        self._assistant.prompt(Conversation((*first, *turns, user_message("?")), tools))
        self._session.system = text
        self._session.reset(turns)
        self._note(f"going on after {sum(message.role == 'user' for message in turns)} questions")


def changed(generation: Generation, settings: Sequence[str]) -> Generation:
    """Settings such as `temperature=0.7` laid over others; `seed=none` takes the seed away.

    Raises `MmftError` for a name or value there is not.
    """
    hints = {name: hint for name, hint in get_type_hints(Generation).items() if name != "stop"}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in hints:
            raise MmftError(f"{name!r} is no setting{did_you_mean(name, hints)}; there are {', '.join(hints)}")
        kinds = get_args(hints[name]) or (hints[name],)
        if value.lower() == "none" and types.NoneType in kinds:
            values[name] = None
            continue
        try:
            values[name] = kinds[0](value)
        except ValueError:
            raise MmftError(f"{setting}: {name} is {NUMBERS[kinds[0]]}") from None
    return dataclasses.replace(generation, **values)


def _path(command: str, path: str) -> Path:
    if not path:
        raise MmftError(f"{command} needs the path of a file")
    return Path(path.strip("'\"")).expanduser()


def _attached(images: Sequence[Path]) -> str:
    return f"with the next question: {', '.join(image.name for image in images)}"

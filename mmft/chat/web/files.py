"""A conversation to take along: the JSON of `/save`, which `/load` of `mmft chat` reads, its pictures beside it."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from zipfile import ZIP_DEFLATED, ZipFile

from mmft.chat.transcript import write_transcript
from mmft.chat.web.turns import Seat, Turn, conversation
from mmft.chat.web.uploads import SAVED, stored
from mmft.types import Conversation

NAME = "conversation"
MOST = 100  # downloads of all visitors together
ROOM = 500_000_000  # bytes of them


class Downloads:
    """The last conversation that each visitor took along, until he leaves.

    Who speaks to the server without a browser never leaves: so of all only the newest are kept, at most `most` and, but
    for the very newest, of at most `room` bytes together.
    """

    def __init__(self, most: int = MOST, room: int = ROOM) -> None:
        self._most, self._room = most, room
        self._folders: dict[str, Path] = {}  # the oldest first
        self._lock = Lock()

    def write(self, visitor: str, turns: Sequence[Turn], seats: Sequence[Seat], system: str | None) -> Path | None:
        """The file, in the place of the visitor's one before; None where nothing was said."""
        said = [conversation(turns, column, system, seat.tools) for column, seat in enumerate(seats)]
        if not any(message.role == "assistant" for one in said for message in one.messages):
            return None
        home = Path(os.environ.get("GRADIO_TEMP_DIR", tempfile.gettempdir())) / SAVED
        home.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=home))
        try:
            path = write_conversation(folder, said)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._remove(visitor)
            self._folders[visitor] = folder
            while len(self._folders) > 1 and (len(self._folders) > self._most or self._size() > self._room):
                self._remove(next(iter(self._folders)))
        return path

    def remove(self, visitor: str) -> None:
        """Who has left."""
        with self._lock:
            self._remove(visitor)

    def _remove(self, visitor: str) -> None:
        if folder := self._folders.pop(visitor, None):
            shutil.rmtree(folder, ignore_errors=True)

    def _size(self) -> int:
        return sum(map(stored, self._folders.values()))


def write_conversation(folder: Path, said: Sequence[Conversation]) -> Path:
    """`conversation.json` in a folder, or `conversation.zip` where there are pictures or two models.

    In the archive the pictures go by relative paths, so that it is unpacked anywhere and loaded in its folder.
    """
    names = [NAME] if len(said) == 1 else [f"{NAME}-{n + 1}" for n in range(len(said))]
    files = [folder / f"{name}.json" for name in names]
    pictures: dict[str, str] = {}
    for path, one in zip(files, said, strict=True):
        write_transcript(path, one)
        _make_relative(path, pictures)
    if len(files) == 1 and not pictures:
        return files[0]
    with ZipFile(folder / f"{NAME}.zip", "w", ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.name)
            path.unlink()
        for source, name in pictures.items():
            archive.write(source, name)
    return folder / f"{NAME}.zip"


def _make_relative(path: Path, pictures: dict[str, str]) -> None:
    """Name every picture by its place in the archive, and keep which is which in `pictures`."""
    content = json.loads(path.read_text("utf-8"))
    for message in content["messages"]:
        for part in message.get("content") if isinstance(message.get("content"), list) else ():
            if part["type"] == "image":
                source = part["path"]
                part["path"] = pictures.setdefault(source, f"pictures/{len(pictures) + 1}-{Path(source).name}")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

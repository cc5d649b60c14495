"""A conversation to take along: the JSON of `/save`, which `/load` of `mmft chat` reads, its pictures beside it."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from mmft.chat.transcript import write_transcript
from mmft.chat.web.turns import Seat, Turn, conversation

NAME = "conversation"


def write_conversation(turns: Sequence[Turn], seats: Sequence[Seat], system: str | None) -> Path | None:
    """`conversation.json`, or `conversation.zip` where there are pictures or two models; None where nothing was said.

    In the archive the pictures go by relative paths, so that it is unpacked anywhere and loaded in its folder.
    """
    said = [conversation(turns, column, system, seat.tools) for column, seat in enumerate(seats)]
    if not any(message.role == "assistant" for one in said for message in one.messages):
        return None
    folder = Path(tempfile.mkdtemp(prefix="save-", dir=os.environ.get("GRADIO_TEMP_DIR")))
    files = (
        [folder / f"{NAME}.json"] if len(seats) == 1 else [folder / f"{NAME}-{n + 1}.json" for n in range(len(seats))]
    )
    pictures: dict[str, str] = {}
    for path, one in zip(files, said, strict=True):
        write_transcript(path, one)
        _make_relative(path, pictures)
    if len(files) == 1 and not pictures:
        return files[0]
    with ZipFile(folder / f"{NAME}.zip", "w", ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.name)
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

"""The file a conversation is kept in."""

import json
from pathlib import Path

import pytest
from PIL import Image as PILImage

from mmft.chat.transcript import read_transcript, write_transcript
from mmft.errors import DataError
from mmft.types import Conversation, Message, Text


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PILImage.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def made(arguments: str) -> str:
    """A file with a call of these arguments."""
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    return json.dumps({"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"talk\.json: no conversation: "),
        ("[]", "no list 'messages', as /save writes"),
        ('{"messages": [{"role": "robot", "content": ""}]}', r"messages\[0\]: role is 'robot'; allowed are system, "),
        ('{"messages": [{"role": "user", "content": 1}]}', r"messages\[0\]: content is neither"),
        ('{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', r"content\[0\]: allowed are"),
        ("[" * 200_000, r"talk\.json: no conversation: .*recursion"),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            r"\[0\]: it has half a character, '\\ud800'",
        ),
        (made("[" * 200_000), r"messages\[0\]\.tool_calls\[0\]: allowed is"),
        (made('{"a": "\\ud800"}'), r"messages\[0\]\.tool_calls\[0\]: it has half a character"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(content, "utf-8")
    with pytest.raises(DataError, match=message):
        read_transcript(tmp_path / "talk.json")


def test_pictures_of_a_file_are_looked_for_beside_it_and_then_in_the_current_folder(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken along/pictures").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "taken along/talk.json"
    parts = [{"type": "image", "path": path} for path in ("pictures/1-red.png", "2-red.png", str(picture))]
    file.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}), "utf-8")
    (file.parent / "pictures/1-red.png").write_bytes(picture.read_bytes())
    for folder in (file.parent / "pictures", tmp_path / "elsewhere"):
        (folder / "2-red.png").write_bytes(picture.read_bytes())
    found = [Path(image.source) for image in read_transcript(file).images]
    assert found == [file.parent / "pictures/1-red.png", Path("2-red.png"), picture]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"talk\.json: cannot be written: No such file or directory"):
        write_transcript(tmp_path / "nowhere" / "talk.json", Conversation((Message("user", (Text("x"),)),)))

"""A conversation as a file: JSON in the form of OpenAI's chat messages, pictures by their paths."""

import json
from pathlib import Path
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Image, Message, Text

ROLES = ("system", "user", "assistant", "tool")


def write_transcript(path: Path, conversation: Conversation) -> None:
    """Write `{"messages": [{"role", "content"}]}`. Raises `DataError` where the file cannot be written."""
    messages = [{"role": message.role, "content": _content(message)} for message in conversation.messages]
    try:
        path.write_text(json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be written: {_reason(error)}") from error


def read_transcript(path: Path) -> Conversation:
    """What `write_transcript` wrote. Raises `DataError`, with the number of the message, for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no conversation: {_reason(error)}") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise DataError(f"{path}: no conversation: it has no list 'messages', as /save writes")
    return Conversation(tuple(_message(f"{path}: messages[{n}]", given) for n, given in enumerate(messages)))


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.text
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": "image", "path": str(Path(part.source).absolute())}
        for part in message.parts
    ]


def _message(where: str, given: Any) -> Message:
    role, content = (given.get("role"), given.get("content")) if isinstance(given, dict) else (None, None)
    if role not in ROLES:
        raise DataError(f"{where}: role is {role!r}; allowed are {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"{where}: content is neither a text nor a list of parts")
    return Message(role, tuple(_part(f"{where}.content[{n}]", part) for n, part in enumerate(parts)))


def _part(where: str, part: Any) -> Text | Image:
    kind = part.get("type") if isinstance(part, dict) else None
    text, path = (part.get("text"), part.get("path")) if kind else (None, None)
    if kind == "text" and isinstance(text, str):
        return Text(text)
    if kind == "image" and isinstance(path, str):
        return Image(Path(path))
    raise DataError(f"{where}: allowed are {{'type': 'text', 'text': ...}} and {{'type': 'image', 'path': ...}}")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

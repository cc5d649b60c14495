"""A conversation as a file: JSON in the form of OpenAI's chat messages, pictures by their paths.

With tools it is a record that the data map `openai` reads, so what was asked of a large model may teach a small one.
"""

import json
from pathlib import Path
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Image, Message, Text, ToolCall

ROLES = ("system", "user", "assistant", "tool")


def write_transcript(path: Path, conversation: Conversation) -> None:
    """Write `{"messages": [{"role", "content"}]}`, and calls and tools where there are any.

    Raises `DataError` where the file cannot be written.
    """
    tools = {"tools": [dict(tool) for tool in conversation.tools]} if conversation.tools else {}
    content = {"messages": [_written(message) for message in conversation.messages], **tools}
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be written: {_reason(error)}") from error


def read_transcript(path: Path) -> Conversation:
    """The messages that `write_transcript` wrote; tools are what the session has, not what the file says.

    A relative path of a picture is looked for beside the file first, then in the current folder.
    Raises `DataError`, with the number of the message, for anything else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no conversation: {_reason(error)}") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise DataError(f"{path}: no conversation: it has no list 'messages', as /save writes")
    return Conversation(
        tuple(_message(f"{path}: messages[{n}]", given, path.parent) for n, given in enumerate(messages))
    )


def _written(message: Message) -> dict[str, Any]:
    content = _content(message) if message.parts else None
    written: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        written["tool_calls"] = [_written_call(call) for call in message.tool_calls]
    return written if message.call_id is None else {**written, "tool_call_id": message.call_id}


def _written_call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    written = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return written if call.id is None else {"id": call.id, **written}


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.text
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": "image", "path": str(Path(part.source).absolute())}
        for part in message.parts
    ]


def _message(where: str, given: Any, folder: Path) -> Message:
    _check_text(where, given)
    role, content = (given.get("role"), given.get("content")) if isinstance(given, dict) else (None, None)
    if role not in ROLES:
        raise DataError(f"{where}: role is {role!r}; allowed are {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    calls = given.get("tool_calls") or []
    parts = [] if parts is None and calls else parts
    if not isinstance(parts, list):
        raise DataError(f"{where}: content is neither a text nor a list of parts")
    read = tuple(_part(f"{where}.content[{n}]", part, folder) for n, part in enumerate(parts))
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise DataError(f"{where}: tool_calls are a list, in a message of the assistant")
    made = tuple(_call(f"{where}.tool_calls[{n}]", call) for n, call in enumerate(calls))
    call_id = given.get("tool_call_id")
    return Message(role, read, made, call_id=str(call_id) if call_id is not None else None)


def _call(where: str, given: Any) -> ToolCall:
    try:
        function = given["function"]
        name, arguments, call_id = function["name"], json.loads(function["arguments"]), given.get("id")
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        name, arguments, call_id = None, None, None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise DataError(f"{where}: allowed is {{'function': {{'name': ..., 'arguments': '{{...}}'}}}}")
    _check_text(where, arguments)
    return ToolCall(name, arguments, None if call_id is None else str(call_id))


def _part(where: str, part: Any, folder: Path) -> Text | Image:
    kind = part.get("type") if isinstance(part, dict) else None
    text, path = (part.get("text"), part.get("path")) if kind else (None, None)
    if kind == "text" and isinstance(text, str):
        return Text(text)
    if kind == "image" and isinstance(path, str):
        beside = folder / path
        return Image(beside if beside.is_file() else Path(path))
    raise DataError(f"{where}: allowed are {{'type': 'text', 'text': ...}} and {{'type': 'image', 'path': ...}}")


def _check_text(where: str, given: Any) -> None:
    """JSON may spell halves of characters, which no tokenizer takes: refused here, not at every question after it."""
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(f"{where}: it has half a character, {half}, which is no text") from error
    except RecursionError as error:
        raise DataError(f"{where}: too many lists and objects inside one another") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

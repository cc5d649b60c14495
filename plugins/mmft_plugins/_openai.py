"""Messages in OpenAI's form, in full, and the way back; for `openai`, `messages`, `agent`, `prompt_completion`.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "loss": true}]}

`content` is a string, None, or a list of parts; `loss` (or `weight`, as OpenAI's fine-tuning files call it) turns the
training of one message off or on. What an assistant thought stands in `reasoning_content` (or `thinking`, `reasoning`),
or in parts of type "thinking". Format: https://platform.openai.com/docs/api-reference/chat/create.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Document, Image, Message, RawRecord, Role, Sample, Text, ToolCall
from mmft_plugins import _turns
from mmft_plugins._records import keys_found, object_list, one_of, shown, text_field

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",  # the name of the system role since OpenAI's o1
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # its name before 2023-11
}
SWITCH: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # DeepSeek's and Qwen's name, Ollama's, OpenRouter's
SOURCES = ("image", "path", "url")  # where a part of type "image" keeps its path


def read(record: RawRecord) -> Conversation | None:
    """The conversation of a record; None where no message is left to train.

    A part `{"type": "image"}` without a path takes the next of the record's `images` (or `image`), which must be used
    up; where no part has a place for one, `<image>` marks in the questions have, and without marks the first question.
    """
    images = _turns.image_list(record, "images") or _turns.image_list(record, "image")
    waiting = iter(images)
    messages = messages_of(record, "messages", waiting)
    left = tuple(waiting)
    if left and len(left) < len(images):
        raise DataError(f"{len(images)} images, but {len(images) - len(left)} parts of type 'image' to show them in")
    if left:
        messages = _turns.with_images(messages, left)
    return _turns.conversation(messages, _turns.tool_schemas(record.get("tools") or record.get("functions")))


def messages_of(record: RawRecord, key: str, images: Iterator[Image]) -> list[Message]:
    """The messages under `key`."""
    return [_message(message, f"{key}[{number}]", images) for number, message in enumerate(object_list(record, key))]


def _message(message: Mapping[str, Any], where: str, images: Iterator[Image]) -> Message:
    try:
        name = text_field(message, "role")
        if name not in ROLES:
            raise DataError(f"role {name!r}; allowed: {one_of(ROLES)}")
        calls = message.get("tool_calls") or message.get("function_call")
        if calls and name != "assistant":
            raise DataError(f"'tool_calls' in a message of role {name!r}; only an assistant calls tools")
        loss = _loss(message)
        if loss and ROLES[name] == "tool":
            raise DataError("a tool message asks to be trained; tool output is never a target")
        return Message(
            ROLES[name],
            _parts(message, images),
            _turns.tool_calls(calls) if calls else (),
            loss,
            _turns.identifier(message, "tool_call_id") if ROLES[name] == "tool" else None,
            _reasoning(message) if name == "assistant" else None,
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _reasoning(message: Mapping[str, Any]) -> str | None:
    """What the assistant thought, from its own field or from parts of `content`; None where it says nothing."""
    key = next((key for key in THOUGHTS if message.get(key)), None)
    if key is not None:
        thought = text_field(message, key)
        return thought if thought.strip() else None
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else ()
    thoughts = [_thought(part) for part in parts if _is_thought(part)]
    return "\n".join(thought for thought in thoughts if thought.strip()) or None


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "thinking"


def _thought(part: Mapping[str, Any]) -> str:
    """The text of a part of type "thinking": a string, or a list of texts as Mistral has it."""
    value = part.get("thinking")
    if isinstance(value, list | tuple):
        return "".join(text_field(piece, "text") for piece in object_list({"thinking": value}, "thinking"))
    return text_field(part, "thinking")


def _loss(message: Mapping[str, Any]) -> bool | None:
    for key in ("loss", "weight"):
        value = message.get(key)
        if value is None:
            continue
        switch = value.strip().lower() if isinstance(value, str) else value
        if not isinstance(switch, str | int | float) or switch not in SWITCH:
            raise DataError(f"{key!r} must be true, false, 1 or 0, found {shown(value)}")
        return SWITCH[switch]
    return None


def _parts(message: Mapping[str, Any], images: Iterator[Image]) -> tuple[Text | Image, ...]:
    content = message.get("content")
    if content is None:
        if "content" not in message and not message.get("tool_calls") and not message.get("function_call"):
            raise DataError(f"'content' is missing; keys found: {keys_found(message)}")
        return ()
    if isinstance(content, str):
        return (Text(content),) if content else ()
    if not isinstance(content, list | tuple):
        raise DataError(f"'content' must be a string or a list of parts, found {type(content).__name__}")
    if message.get("role") == "assistant":  # its thoughts are read by `_reasoning`
        content = [part for part in content if not _is_thought(part)]
    parts = [Text(part) if isinstance(part, str) else _part(part, images) for part in content]
    return tuple(part for part in parts if part != Text(""))


def _part(part: Any, images: Iterator[Image]) -> Text | Image:
    """One part of a content list; images by path or URL, as OpenAI (`image_url`) or transformers (`image`) has them."""
    if not isinstance(part, Mapping):
        raise DataError(
            f"a part of 'content' must be an object or a string, found {type(part).__name__}: {shown(part)}"
        )
    kind = text_field(part, "type")
    if kind == "text":
        return Text(text_field(part, "text"))
    if kind == "image_url":
        url = part.get("image_url")
        return Image(text_field(url, "url") if isinstance(url, Mapping) else text_field(part, "image_url"))
    if kind == "image":
        key = next((key for key in SOURCES if part.get(key) is not None), None)
        if key is not None:
            return Image(text_field(part, key))
        image = next(images, None)
        if image is None:
            raise DataError("a part of type 'image' without a path, and the record's 'images' has no other left for it")
        return image
    raise DataError(f"a part of type {kind!r}; allowed: 'text', 'image', 'image_url'")


def write(sample: Sample) -> RawRecord:
    """A record of OpenAI messages. Raises `DataError` for a document."""
    if isinstance(sample, Document):
        raise DataError("a document is no conversation; only 'pretrain' has a place for it")
    record: dict[str, Any] = {"messages": [_written(message) for message in sample.messages]}
    return {**record, "tools": [dict(tool) for tool in sample.tools]} if sample.tools else record


def _written(message: Message) -> dict[str, Any]:
    content: Any = message.text
    if message.images:
        content = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", "image": str(part.source)}
            for part in message.parts
        ]
    written: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning is not None:
        written["reasoning_content"] = message.reasoning
    if message.tool_calls:
        written["tool_calls"] = [written_call(call) for call in message.tool_calls]
    if message.call_id is not None:
        written["tool_call_id"] = message.call_id
    return written if message.loss is None else {**written, "loss": message.loss}


def written_call(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI has it: the arguments are a JSON string, so that every record has the same columns."""
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    written = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return written if call.id is None else {"id": call.id, **written}

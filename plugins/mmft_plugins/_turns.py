"""From turns to a conversation, the same for every data map: what is left out, what is noted, when nothing is left.

Turns of one role that follow one another stay separate messages (XTuner joins questions without a separator, which
runs words together); whether a format takes them is the chat template's affair.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import dropwhile
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Image, Message, RawRecord, Role, Text, ToolCall
from mmft_plugins._records import keys_found, object_list, shown, text_field

MARK = "<image>"


def message(role: Role, text: str, **fields: Any) -> Message:
    """A message of plain text, without a part where the text is empty."""
    return Message(role, (Text(text),) if text else (), **fields)


def asked(question: str, answer: str, *, system: str = "") -> Conversation | None:
    """One question and its answer; None where the answer is blank."""
    turns = [message("user", question), message("assistant", answer)]
    return conversation([message("system", system), *turns] if system else turns)


def conversation(
    messages: Sequence[Message], tools: tuple[Mapping[str, Any], ...] = (), notes: tuple[str, ...] = ()
) -> Conversation | None:
    """The conversation of these messages; None where none of them is left to train.

    Three things are left out or mended, each with a note that counts it: answers before the first question, which have
    nothing to answer (as LLaVA and XTuner do; system messages stay); the training of an empty answer, which would teach
    to stop at once; and turns after the last trained answer, which teach nothing and make formats that rewrite earlier
    turns, as Qwen3's, train none.
    """
    rest = list(dropwhile(lambda one: one.role != "user", messages))
    head = messages[: len(messages) - len(rest)]
    kept = [*(one for one in head if one.role == "system"), *rest]
    if lost := len(messages) - len(kept):
        notes = (*notes, f"{counted(lost, 'answer')} before the first question")
    last, empty = -1, 0
    for number, one in enumerate(kept):
        if not one.is_trained:
            continue
        if one.tool_calls or one.text.strip():
            last, within = number, empty
        else:
            kept[number] = replace(one, loss=False)
            empty += 1
    if last < 0:
        return None
    if within:
        notes = (*notes, f"empty answers are not trained: {within}")
    if after := len(kept) - 1 - last:
        notes = (*notes, f"turns after the last trained answer are left out: {after}")
    return Conversation(tuple(kept[: last + 1]), tools, notes)


def history(record: RawRecord) -> list[Message]:
    """The earlier turns under `history`: a list of pairs of question and answer, or None."""
    value = record.get("history")
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"'history' must be a list of [question, answer] pairs, found {shown(value)}")
    return [turn for number, pair in enumerate(value) for turn in _pair(pair, number)]


def _pair(pair: object, number: int) -> tuple[Message, Message]:
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        question, answer = pair
        if isinstance(question, str) and isinstance(answer, str):
            return message("user", question), message("assistant", answer)
    raise DataError(f"history[{number}] must be a pair of strings, found {shown(pair)}")


def image_list(record: RawRecord, key: str) -> tuple[Image, ...]:
    """The images under `key`: a path, a list of paths, None, or nothing.

    A `{"path": ...}` object is a path too: that is how Hugging Face's `datasets` writes an image column.
    """
    value = record.get(key)
    if value is None:
        return ()
    items = list(value) if isinstance(value, list | tuple) else [value]
    paths = [item.get("path") if isinstance(item, Mapping) else item for item in items]
    found = tuple(Image(path) for path in paths if isinstance(path, str) and path)
    if len(found) < len(paths):
        raise DataError(f"{key!r} must be a path, a list of paths or null, found {shown(value)}")
    return found


def with_images(turns: Sequence[Message], images: Sequence[Image], asker: str = "user") -> list[Message]:
    """The turns with each `<image>` mark of a question replaced by the next image, where it stands.

    Without any mark the images come first in the first question, a newline after each. In an answer `<image>` is text.
    `asker` is what the format calls the user, for the error. Raises `DataError` where marks and images are not equally
    many.
    """
    marks = sum(turn.text.count(MARK) for turn in turns if turn.role == "user")
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if images and not marks and first is None:
        raise DataError(f"{counted(len(images), 'image')}, but no turn from {asker!r} to show it in")
    front = MARK + "\n"
    lead = front * len(images) if images and not marks else ""
    if not lead and marks != len(images):
        raise DataError(f"{counted(marks, f'{MARK} mark')}, {counted(len(images), 'image')}; the numbers must be equal")
    waiting = iter(images)
    return [
        turn
        if turn.role != "user" or not images
        else replace(turn, parts=tuple(_pieces((lead if number == first else "") + turn.text, waiting)))
        for number, turn in enumerate(turns)
    ]


def _pieces(text: str, images: Iterator[Image]) -> Iterator[Text | Image]:
    for number, piece in enumerate(text.split(MARK)):
        if number:
            yield next(images)
        if piece:
            yield Text(piece)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def tool_schemas(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas as OpenAI writes them; a bare function schema is wrapped, a JSON string is read."""
    tools = from_json(tools, "'tools' is a string but not JSON") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return ()
    schemas = object_list({"tools": tools}, "tools")
    for schema in schemas:
        if "function" not in schema and "name" not in schema:
            raise DataError(f"a tool needs 'function' or 'name'; keys found: {keys_found(schema)}")
    return tuple(schema if "function" in schema else {"type": "function", "function": schema} for schema in schemas)


def tool_call(call: Mapping[str, Any]) -> ToolCall:
    """`{"id", "type": "function", "function": {"name", "arguments"}}`, or the inner object alone."""
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise DataError(f"a tool call's 'function' must be an object, found {shown(function)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = from_json(arguments, "the arguments of a tool call are not JSON")
    arguments = {} if arguments is None or (isinstance(arguments, str) and not arguments.strip()) else arguments
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of a tool call must be an object, found {shown(arguments)}")
    return ToolCall(text_field(function, "name"), arguments, identifier(call, "id"))


def identifier(holder: Mapping[str, Any], key: str) -> str | None:
    """The id of a tool call: a string, a number read as one, or None where it is missing or empty."""
    value = holder.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{key!r} must be a string, found {type(value).__name__}: {shown(value)}")
    return str(value)


def tool_calls(calls: Any) -> tuple[ToolCall, ...]:
    """One call or a list of calls, as objects or as one JSON string."""
    value = from_json(calls, "a tool call is not JSON") if isinstance(calls, str) else calls
    items: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return tuple(map(tool_call, object_list({"tool_calls": list(items)}, "tool_calls")))


def from_json(text: str, problem: str) -> Any:
    """The value of a JSON string. Raises `DataError` that starts with `problem`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{problem} ({error}): {shown(text)}") from error

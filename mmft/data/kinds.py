"""What plugins give is looked at once, where it comes in: a sample from a data map, a record from a data source.

Whatever is of another kind would fail far from here, in code that is not to blame, and for each record again.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import BadRecord, Conversation, Document, Image, Message, RawRecord, Role, Sample, Text, ToolCall

ROLES: tuple[str, ...] = get_args(Role)


def mapped(data_map: DataMap, record: RawRecord) -> Sample | None:
    """What a map makes of a record. Raises `DataError` where that is no sample, and what the map itself raises."""
    sample = data_map.fn(record)
    if sample is not None and (wrong := _wrong_sample(sample)):
        raise DataError(f"data map {data_map.name!r} gave {wrong}")
    return sample


def sound_records(source: str, records: Iterable[Any]) -> Iterator[RawRecord | BadRecord]:
    """The records of a data source; one that is no mapping becomes a `BadRecord`.

    Raises `DataError` where they cannot be read one after another.
    """
    try:
        one_by_one = iter(records)
    except TypeError as error:
        raise DataError(f"data source {source!r}: load gave {_a(records)}, expected records") from error
    for record in one_by_one:
        if isinstance(record, dict | BadRecord | Mapping):
            yield record
        else:
            yield BadRecord(f"data source {source!r} gave {_a(record)}, expected a mapping of columns or a BadRecord")


def _wrong_sample(sample: Any) -> str:
    """What is wrong with a sample; empty where nothing is."""
    if isinstance(sample, Document):
        return _wrong_text("document", sample.text)
    if not isinstance(sample, Conversation):
        return f"{_a(sample)}, expected a Conversation, a Document or None"
    if not isinstance(sample.messages, tuple | list):
        return f"messages that are {_a(sample.messages)}, expected a tuple"
    return next(filter(None, map(_wrong_message, sample.messages)), "")


def _wrong_message(message: Any) -> str:
    if not isinstance(message, Message):
        return f"a message that is {_a(message)}, expected a Message"
    if message.role not in ROLES:
        return f"a message with the role {message.role!r}; roles are {', '.join(ROLES)}"
    if not isinstance(message.parts, tuple | list):
        return f"a message whose parts are {_a(message.parts)}, expected a tuple of Text and Image"
    for part in message.parts:
        if isinstance(part, Text):
            if wrong := _wrong_text("message", part.text):
                return wrong
        elif not isinstance(part, Image):
            return f"a message with a part that is {_a(part)}, expected Text or Image"
    for call in message.tool_calls:
        if not isinstance(call, ToolCall):
            return f"a tool call that is {_a(call)}, expected a ToolCall"
    return ""


def _wrong_text(where: str, text: Any) -> str:
    return "" if isinstance(text, str) else f"a {where} with a text that is {_a(text)}, expected a str"


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"

"""Reading fields of a raw record, with errors that say what was found and what is allowed."""

from collections.abc import Iterable, Mapping
from typing import Any

from mmft.errors import DataError
from mmft.types import RawRecord


def keys_found(record: Mapping[str, Any]) -> str:
    """The keys of a record, for an error message."""
    return ", ".join(map(repr, record)) or "none"


def text_field(record: RawRecord, key: str, *, default: str | None = None) -> str:
    """The string under `key`. With a `default` the key may be missing or None.

    Raises `DataError` for a missing key or a value that is not a string.
    """
    value = record.get(key)
    if value is None:
        if default is not None:
            return default
        problem = "is None; it must be a string" if key in record else f"is missing; keys found: {keys_found(record)}"
        raise DataError(f"{key!r} {problem}")
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, found {type(value).__name__}: {shown(value)}")
    return value


def object_list(record: RawRecord, key: str) -> list[Mapping[str, Any]]:
    """The list of objects under `key`. Raises `DataError` where it is missing or anything else."""
    if key not in record:
        raise DataError(f"{key!r} is missing; keys found: {keys_found(record)}")
    value = record[key]
    if not isinstance(value, list | tuple):
        raise DataError(f"{key!r} must be a list of objects, found {type(value).__name__}: {shown(value)}")
    for number, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise DataError(f"{key}[{number}] must be an object, found {type(item).__name__}: {shown(item)}")
    return list(value)


def one_of(names: Iterable[str]) -> str:
    """`'a', 'b', 'c'`, for an error message."""
    return ", ".join(map(repr, names))


def shown(value: Any, width: int = 80) -> str:
    """A value in an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."

"""Columns of a table: chosen, and given other names, so that a data map finds what it reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mmft.errors import DataError
from mmft.types import BadRecord, RawRecord
from mmft_plugins._records import one_of


def check_columns(where: object, found: Iterable[str], columns: Sequence[str] | None) -> None:
    """Raise `DataError` where a column that is named is not there."""
    known = list(found)
    missing = [name for name in columns or () if name not in known]
    if missing:
        raise DataError(f"{where}: no column {one_of(missing)}; columns found: {one_of(known)}")


def renamed(
    records: Iterable[RawRecord | BadRecord], rename: Mapping[str, str] | None, where: object
) -> Iterator[RawRecord | BadRecord]:
    """The records of one table with other names for some columns: `{"question": "instruction"}`.

    Raises `DataError` where the first record has no such column, and where two columns would have one name.
    """
    checked = False
    for record in records:
        if not rename or isinstance(record, BadRecord):
            yield record
            continue
        if not checked:
            _check_names(record, rename, where)
            checked = True
        yield {rename.get(name, name): value for name, value in record.items()}


def _check_names(record: RawRecord, rename: Mapping[str, str], where: object) -> None:
    check_columns(f"{where}: rename", record, list(rename))
    names = [rename.get(name, name) for name in record]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: rename gives two columns the name {twice!r}; columns found: {one_of(record)}")

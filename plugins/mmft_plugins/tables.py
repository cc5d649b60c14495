"""Data sources: `csv`, `tsv` and `parquet` files, a row a record.

Nothing is guessed: every value of a text table is a string, every value of a parquet file has the type the file gives
it. A column of bytes, such as images inside a parquet file, is passed on as bytes.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import RawRecord
from mmft_plugins._files import (
    BLOCK,
    BOM,
    Paths,
    check_installed,
    find_files,
    not_utf8,
    optional_package,
    read_all,
    read_one,
)
from mmft_plugins._records import one_of, shown

LONGEST_FIELD = 64 << 20  # characters; a missing quote would otherwise read the rest of the file into one field
ROWS = 1000  # of a parquet file, read at a time


def csv_files(path: Paths, delimiter: str = ",") -> list[Path]:
    """The files `csv` reads, in order; see `find_files`."""
    return find_files(path, (".csv",))


def tsv_files(path: Paths, delimiter: str = "\t") -> list[Path]:
    """The files `tsv` reads, in order; see `find_files`."""
    return find_files(path, (".tsv", ".tab"))


def load_csv(path: Paths, delimiter: str = ",") -> Iterator[RawRecord]:
    """The rows of CSV files with a header line: column name to string. Blank lines are skipped.

    Quoting as in RFC 4180. Raises `DataError` with the file and the line.
    """
    return read_all(csv_files(path), partial(_read_table, delimiter=delimiter))


def load_tsv(path: Paths, delimiter: str = "\t") -> Iterator[RawRecord]:
    """The rows of tab-separated files; otherwise as `load_csv`."""
    return read_all(tsv_files(path), partial(_read_table, delimiter=delimiter))


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    if csv.field_size_limit() < LONGEST_FIELD:  # Python's own limit is 131,072 characters, less than a long document
        csv.field_size_limit(LONGEST_FIELD)
    with file.open("rb") as lines:
        rows = csv.reader(_decoded(file, lines), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(
                    f"{file} line {line}: {error}; the usual cause is a quote that is not closed"
                ) from error
            if row is None:
                break
            if not row:
                continue
            if header is None:
                header = _checked_header(file, row)
            elif len(row) != len(header):
                raise DataError(
                    f"{file} line {line}: {len(row)} fields, the header has {len(header)} ({one_of(header)}): "
                    f"{shown(row)}; a field that holds the delimiter {delimiter!r} or a line break stands in quotes"
                )
            else:
                yield f"line {line}", dict(zip(header, row, strict=True))
        if header is None:
            raise DataError(f"{file}: the file is empty; its first line must name the columns")


def _checked_header(file: Path, header: list[str]) -> list[str]:
    bad = next((name for name in header if not name.strip() or header.count(name) > 1), None)
    if bad is not None:
        what = f"the column {bad!r} is there twice" if bad.strip() else "a column has no name"
        raise DataError(f"{file} line 1: {what}: {shown(header)}; the first line must name each column, once")
    return header


def _decoded(file: Path, lines: Iterable[bytes]) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(BOM) if number == 1 else line
        try:
            yield text.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = offset + len(line) - len(text) + error.start
            raise not_utf8(f"{file} line {number}", byte, error) from error
        offset += len(line)


def parquet_files(path: Paths, columns: Sequence[str] | None = None) -> list[Path]:
    """The files `parquet` reads, in order; see `find_files`. Raises `DataError` where pyarrow is not installed."""
    check_installed("pyarrow", "parquet", "parquet")
    return find_files(path, (".parquet", ".pq"))


def load_parquet(path: Paths, columns: Sequence[str] | None = None) -> Iterator[RawRecord]:
    """The rows of parquet files, all columns or those named; a row group is never held whole.

    Raises `DataError` for a file that is not parquet and for a column that it does not have.
    """
    return load_parquet_from(0, path, columns)


def load_parquet_from(start: int, path: Paths, columns: Sequence[str] | None = None) -> Iterator[RawRecord]:
    """What `load_parquet` yields after the first `start` rows; row groups before those are not read."""
    arrow, parquet = (optional_package(name, "parquet", "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    for file in parquet_files(path):
        try:
            file.stat()  # its error is clearer than pyarrow's
            # By default a column of a whole row group is read at once, which may be the file.
            with parquet.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False) as opened:
                rows = opened.metadata.num_rows
                if start < rows:
                    _check_columns(file, opened.schema_arrow.names, columns)
                    yield from read_one(file, _read_rows(opened, start, columns))
            start = max(0, start - rows)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not a parquet file, or damaged: {str(error).splitlines()[0]}") from error


def _read_rows(opened: Any, start: int, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    group, number = 0, 0
    while number + opened.metadata.row_group(group).num_rows <= start:
        number += opened.metadata.row_group(group).num_rows
        group += 1
    groups = list(range(group, opened.metadata.num_row_groups))
    for batch in opened.iter_batches(ROWS, row_groups=groups, columns=None if columns is None else list(columns)):
        before = max(0, start - number)
        for record in batch.slice(before).to_pylist() if before < len(batch) else ():
            yield "row", record
        number += len(batch)


def _check_columns(file: Path, found: Sequence[str], columns: Sequence[str] | None) -> None:
    missing = [name for name in columns or () if name not in found]
    if missing:
        raise DataError(f"{file}: no column {one_of(missing)}; columns found: {one_of(found)}")


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """Tables."""
    return [
        DatasetSpec(name="csv", load=load_csv, files=csv_files, summary="CSV files with a header line"),
        DatasetSpec(name="tsv", load=load_tsv, files=tsv_files, summary="tab-separated files with a header line"),
        DatasetSpec(
            name="parquet",
            load=load_parquet,
            files=parquet_files,
            load_from=load_parquet_from,
            summary="parquet files (pip install 'mmft[parquet]')",
        ),
    ]

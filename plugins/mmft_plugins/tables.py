"""Data sources: `csv`, `tsv` and `parquet` files, a row a record.

Nothing is guessed: every value of a text table is a string, every value of a parquet file has the type the file gives
it. Pictures inside a parquet file are written to the folder `extract_to`; other bytes are passed on.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import BadRecord, RawRecord
from mmft_plugins._columns import check_columns, renamed
from mmft_plugins._encodings import remedy_of
from mmft_plugins._files import (
    BLOCK,
    NOT_UTF8,
    Paths,
    check_installed,
    find_files,
    first_bytes,
    optional_package,
    read_one,
    refuse_encoding,
    refuse_stand_in,
)
from mmft_plugins._pictures import with_paths
from mmft_plugins._records import one_of, shown

CSV, TSV, PARQUET = (".csv",), (".tsv", ".tab"), (".parquet", ".pq")
LONGEST_FIELD = 64 << 20  # characters; a missing quote would otherwise read the rest of the file into one field
ROWS, ROWS_SIZE = 1000, 32 << 20  # of a parquet file, read at a time: so many, or so many bytes
# A header that is one column of a name, a usual delimiter and further names: it was split at another character.
_ONE_COLUMN = re.compile(r"\w[\w ]*([;,|\t])\w[\w ]*(?:\1\w[\w ]*)*")
FIELDS = "wrong number of fields"  # the kind of a bad record: what stands before the colon


def csv_files(path: Paths, delimiter: str = ",", rename: Mapping[str, str] | None = None) -> list[Path]:
    """The files `csv` reads, in order; see `find_files`."""
    return find_files(path, CSV)


def tsv_files(path: Paths, delimiter: str = "\t", rename: Mapping[str, str] | None = None) -> list[Path]:
    """The files `tsv` reads, in order; see `find_files`."""
    return find_files(path, TSV)


def load_csv(
    path: Paths, delimiter: str = ",", rename: Mapping[str, str] | None = None
) -> Iterator[RawRecord | BadRecord]:
    """The rows of CSV files with a header line: column name to string. Blank lines are skipped.

    Quoting as in RFC 4180. `rename` gives columns other names: `{"question": "instruction"}`. A row with too few or too
    many fields, and one that is not UTF-8, is a bad record. Raises `DataError` with the file and the line.
    """
    for file in csv_files(path):
        yield from renamed(read_one(file, _read_table(file, delimiter)), rename, file)


def load_tsv(
    path: Paths, delimiter: str = "\t", rename: Mapping[str, str] | None = None
) -> Iterator[RawRecord | BadRecord]:
    """The rows of tab-separated files; otherwise as `load_csv`."""
    for file in tsv_files(path):
        yield from renamed(read_one(file, _read_table(file, delimiter)), rename, file)


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str] | BadRecord]]:
    if csv.field_size_limit() < LONGEST_FIELD:  # Python's own limit is 131,072 characters, less than a long document
        csv.field_size_limit(LONGEST_FIELD)
    # Bytes that are not UTF-8 become lone surrogates, so that their row is still found by its quotes and line breaks.
    refuse_encoding(file, first_bytes(file))
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
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
                header = _checked_header(file, row, delimiter)
            else:
                bad = _problem(f"{file.name} line {line}", row, header, delimiter)
                yield f"line {line}", dict(zip(header, row, strict=True)) if bad is None else BadRecord(bad)
        if header is None:
            raise DataError(f"{file}: the file is empty; its first line must name the columns")


def _problem(where: str, row: list[str], header: list[str], delimiter: str) -> str | None:
    """Why a row cannot be read, if so."""
    if len(row) != len(header):
        return (
            f"{FIELDS}: {where} has {len(row)}, the header {len(header)} ({one_of(header)}): {shown(row)}; "
            f"a field that holds the delimiter {delimiter!r} or a line break stands in quotes"
        )
    foreign = _foreign_byte(row)
    return None if foreign is None else f"{NOT_UTF8}: {where} {foreign}"


def _foreign_byte(row: list[str]) -> str | None:
    """What to say of the first byte of a row that is not UTF-8, and the remedy."""
    data = "\n".join(row).encode("utf-8", "surrogateescape")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"holds the byte {data[error.start]:#04x}; {remedy_of(data)}"
    return None


def _checked_header(file: Path, header: list[str], delimiter: str) -> list[str]:
    if foreign := _foreign_byte(header):
        raise DataError(f"{file} line 1: {NOT_UTF8}: it {foreign}")
    other = _ONE_COLUMN.fullmatch(header[0]) if len(header) == 1 else None
    if other is not None and other[1] != delimiter:
        raise DataError(
            f"{file} line 1: one column, {header[0]!r}; where {other[1]!r} separates the columns, give the source "
            f"delimiter={json.dumps(other[1])}; else name the column without it"
        )
    bad = next((name for name in header if not name.strip() or header.count(name) > 1), None)
    if bad is not None:
        what = f"the column {bad!r} is there twice" if bad.strip() else "a column has no name"
        raise DataError(f"{file} line 1: {what}: {shown(header)}; the first line must name each column, once")
    return header


def parquet_files(
    path: Paths,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> list[Path]:
    """The files `parquet` reads, in order; see `find_files`. Raises `DataError` where pyarrow is not installed."""
    check_installed("pyarrow", "parquet", "parquet")
    return find_files(path, PARQUET)


def load_parquet(
    path: Paths,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> Iterator[RawRecord | BadRecord]:
    """The rows of parquet files, all columns or those named; a row group is never held whole.

    A picture in a row, as bytes or as `{"bytes", "path"}`, is written to the folder `extract_to` once, and the record
    holds its path. `rename` gives columns other names. Raises `DataError` for a file that is not parquet, for a column
    that it does not have, and for a picture without `extract_to`.
    """
    return load_parquet_from(0, path, columns, extract_to, rename)


def load_parquet_from(
    start: int,
    path: Paths,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> Iterator[RawRecord | BadRecord]:
    """What `load_parquet` yields after the first `start` rows; row groups before those are not read."""
    arrow, parquet = (optional_package(name, "parquet", "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    for file in parquet_files(path):
        try:
            refuse_stand_in(file, first_bytes(file))  # these errors are clearer than pyarrow's
            # By default a column of a whole row group is read at once, which may be the file.
            with parquet.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False) as opened:
                rows = opened.metadata.num_rows
                if start < rows:
                    check_columns(file, opened.schema_arrow.names, columns)
                    found = with_paths(_read_rows(file, opened, start, columns), extract_to)
                    yield from renamed(found, rename, file)
            start = max(0, start - rows)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not a parquet file, or damaged: {str(error).splitlines()[0]}") from error


def _read_rows(
    file: Path, opened: Any, start: int, columns: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    group, number = 0, 0
    while number + opened.metadata.row_group(group).num_rows <= start:
        number += opened.metadata.row_group(group).num_rows
        group += 1
    groups = range(group, opened.metadata.num_row_groups)
    for batch in opened.iter_batches(
        _batch_rows(opened.metadata), row_groups=list(groups), columns=None if columns is None else list(columns)
    ):
        before = max(0, start - number)
        if before < len(batch):
            for place, record in enumerate(batch.slice(before).to_pylist(), number + before + 1):
                yield f"{file.name} row {place}", record
        number += len(batch)


def _batch_rows(metadata: Any) -> int:
    """How many rows to read at a time: a thousand of text, fewer where they hold pictures."""
    size: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    rows: int = ROWS_SIZE * metadata.num_rows // max(1, size)
    return max(1, min(ROWS, rows))


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """Tables."""
    return [
        DatasetSpec(name="csv", load=load_csv, files=csv_files, summary="CSV files with a header line", suffixes=CSV),
        DatasetSpec(
            name="tsv", load=load_tsv, files=tsv_files, summary="tab-separated files with a header line", suffixes=TSV
        ),
        DatasetSpec(
            name="parquet",
            load=load_parquet,
            files=parquet_files,
            load_from=load_parquet_from,
            summary="parquet files (pip install 'mmft[parquet]')",
            suffixes=PARQUET,
        ),
    ]

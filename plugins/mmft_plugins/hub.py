"""Data sources: `hf` and `modelscope`, data sets by their name on a hub, and folders that `datasets` saved.

The rows come in the order of the data set. Pictures and sounds are not decoded: the bytes of a picture go as they are
to the folder `extract_to`. Name a `revision`: a hub's data may change, and no cache here can see that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import BadRecord, RawRecord
from mmft_plugins._columns import check_columns, renamed
from mmft_plugins._files import check_installed, first_bytes, optional_package, refuse_pointer
from mmft_plugins._pictures import FIELDS, with_paths
from mmft_plugins._records import one_of

SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves behind
BATCH, ROWS = 1000, 50  # rows of an Arrow table that are looked at, and turned into Python objects, at a time


def hf_files(
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> list[Path]:
    """The files of a local folder; none for a data set on the hub.

    Raises `DataError` without the extra `hf`, and where pictures would be written among the files of the data set.
    """
    check_installed("datasets", "hf", "hf")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return []
    if extract_to and Path(extract_to).expanduser().resolve().is_relative_to(folder.resolve()):
        # `load_dataset` takes a folder with many pictures for a folder of pictures.
        raise DataError(f"extract_to: {extract_to} lies inside the data set {path}; name a folder outside it")
    return sorted(file for file in folder.rglob("*") if file.is_file())


def load_hf(
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> Iterator[RawRecord | BadRecord]:
    """The rows of one split of a data set: `path` is its name on the Hugging Face hub, or a local folder.

    `name` is the configuration of a data set that has several; `streaming` reads over the network while it is used and
    stores nothing; `columns`, `extract_to` and `rename` are those of `parquet`. A folder is one that `save_to_disk`
    wrote, or one of data files as on the hub. Raises `DataError` with the reason `datasets` gives.
    """
    return load_hf_from(0, path, name, split, revision, streaming, columns, extract_to, rename)


def load_hf_from(
    start: int,
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> Iterator[RawRecord | BadRecord]:
    """What `load_hf` yields after the first `start` rows."""
    package = optional_package("datasets", "hf", "hf")
    folder = Path(path).expanduser()
    files = hf_files(path, extract_to=extract_to)
    try:
        if any((folder / marker).is_file() for marker in SAVED):
            rows = _split_of(package.load_from_disk(str(folder)), package.DatasetDict, path, split)
        else:
            rows = package.load_dataset(
                str(folder) if folder.is_dir() else path, name, split=split, revision=revision, streaming=streaming
            )
        yield from renamed(with_paths(_rows(rows, start, path, columns), extract_to), rename, path)
    except (OSError, ValueError, RuntimeError, package.exceptions.DatasetsError) as error:
        for file in files:
            refuse_pointer(file, first_bytes(file))
        raise _failed("hf", path, error) from error


def load_modelscope(
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> Iterator[RawRecord | BadRecord]:
    """The rows of one split of a ModelScope data set; the options are those of `hf`.

    Raises `DataError` with the reason `modelscope` gives.
    """
    package = optional_package("modelscope.msdatasets", "modelscope", "modelscope")
    optional = {"subset_name": name, "version": revision}
    try:
        rows = package.MsDataset.load(
            path, split=split, use_streaming=streaming, **{key: value for key, value in optional.items() if value}
        )
        rows = rows.to_hf_dataset() if hasattr(rows, "to_hf_dataset") else rows
        yield from renamed(with_paths(_rows(rows, 0, path, columns), extract_to), rename, path)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _failed("modelscope", path, error) from error


def modelscope_files(
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    extract_to: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
) -> list[Path]:
    """No local files. Raises `DataError` without the extra `modelscope`."""
    check_installed("modelscope", "modelscope", "modelscope")
    return []


def _split_of(saved: Any, several: type, path: str, split: str) -> Any:
    if not isinstance(saved, several):
        return saved
    splits: dict[str, Any] = dict(saved)  # type: ignore[call-overload]
    if split not in splits:
        raise DataError(f"{path}: no split {split!r}; splits found: {one_of(splits)}")
    return splits[split]


def _rows(rows: Any, start: int, path: str, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a data set after its first `start` rows, media as `{"bytes", "path"}`."""
    if start and hasattr(rows, "__len__") and start >= len(rows):  # `skip` refuses what lies behind the end
        return
    if columns is not None:
        check_columns(path, rows.column_names or columns, columns)  # a stream may not know them yet
        rows = rows.select_columns(list(columns))
    rows = rows.skip(start) if start else rows
    for number, row in enumerate(_undecoded(rows), start + 1):
        yield f"{path} row {number}", row


def _undecoded(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows with pictures and sounds as the bytes they are; everything else as `datasets` gives it."""
    features = getattr(rows, "features", None)
    if not features:  # a stream of unknown columns holds no media that `datasets` knows of
        yield from rows
        return
    kept = type(features)(_without_decoding(dict(features)))
    if not hasattr(rows, "__len__"):
        yield from rows.cast(kept) if kept != features else rows
        return
    # A cast would copy the whole data set where pictures are in lists; Arrow tables hold what the file holds.
    for table in rows.with_format("arrow").iter(BATCH):
        for first in range(0, table.num_rows, ROWS):
            yield from map(kept.decode_example, table.slice(first, ROWS).to_pylist())


def _without_decoding(feature: Any) -> Any:
    """A feature of `datasets` with all media in it left as bytes; JSON, which it also decodes, stays as it is."""
    if isinstance(feature, dict):
        return {name: _without_decoding(one) for name, one in feature.items()}
    if isinstance(feature, list):
        return [_without_decoding(one) for one in feature]
    if hasattr(feature, "feature"):  # List, LargeList
        return replace(feature, feature=_without_decoding(feature.feature))
    stored: Any = getattr(feature, "pa_type", None)
    media = bool(getattr(stored, "num_fields", 0)) and {field.name for field in stored} == FIELDS
    return replace(feature, decode=False) if media and feature.decode else feature


def _failed(source: str, path: str, error: Exception) -> DataError:
    reason = next(iter(str(error).splitlines()), "")
    return DataError(
        f"source {source!r}: {path!r} cannot be loaded: {type(error).__name__}: {reason}; "
        "check the name, the split, and that the hub can be reached (a private one needs its login)"
    )


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """Data sets on a hub."""
    return [
        DatasetSpec(
            name="hf",
            load=load_hf,
            files=hf_files,
            load_from=load_hf_from,
            summary="a Hugging Face data set by name, or a folder that save_to_disk wrote (pip install 'mmft[hf]')",
        ),
        DatasetSpec(
            name="modelscope",
            load=load_modelscope,
            files=modelscope_files,
            summary="a ModelScope data set by name (pip install 'mmft[modelscope]')",
        ),
    ]

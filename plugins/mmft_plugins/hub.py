"""Data sources: `hf` and `modelscope`, data sets by their name on a hub, and folders that `datasets` saved.

The rows come in the order of the data set. Columns of images and sounds are not decoded: a row holds `{"bytes",
"path"}` there. Name a `revision`: a hub's data may change, and no cache here can see that.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import RawRecord
from mmft_plugins._files import check_installed, optional_package, read_one
from mmft_plugins._records import one_of

SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves behind


def hf_files(
    path: str, name: str | None = None, split: str = "train", revision: str | None = None, streaming: bool = False
) -> list[Path]:
    """The files of a local folder; none for a data set on the hub. Raises `DataError` without the extra `hf`."""
    check_installed("datasets", "hf", "hf")
    folder = Path(path).expanduser()
    return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []


def load_hf(
    path: str, name: str | None = None, split: str = "train", revision: str | None = None, streaming: bool = False
) -> Iterator[RawRecord]:
    """The rows of one split of a data set: `path` is its name on the Hugging Face hub, or a local folder.

    `name` is the configuration of a data set that has several; `streaming` reads over the network while it is used and
    stores nothing. A folder is one that `save_to_disk` wrote, or one of data files as on the hub.
    Raises `DataError` with the reason `datasets` gives.
    """
    return load_hf_from(0, path, name, split, revision, streaming)


def load_hf_from(
    start: int,
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> Iterator[RawRecord]:
    """What `load_hf` yields after the first `start` rows."""
    package = optional_package("datasets", "hf", "hf")
    folder = Path(path).expanduser()
    try:
        if any((folder / marker).is_file() for marker in SAVED):
            rows = _split_of(package.load_from_disk(str(folder)), package.DatasetDict, path, split)
        else:
            rows = package.load_dataset(
                str(folder) if folder.is_dir() else path, name, split=split, revision=revision, streaming=streaming
            )
        yield from _rows(_undecoded(rows), start, path)
    except (OSError, ValueError, RuntimeError, package.exceptions.DatasetsError) as error:
        raise _failed("hf", path, error) from error


def load_modelscope(
    path: str, name: str | None = None, split: str = "train", revision: str | None = None, streaming: bool = False
) -> Iterator[RawRecord]:
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
        yield from _rows(_undecoded(rows) if hasattr(rows, "features") else rows, 0, path)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _failed("modelscope", path, error) from error


def modelscope_files(
    path: str, name: str | None = None, split: str = "train", revision: str | None = None, streaming: bool = False
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


def _undecoded(rows: Any) -> Any:
    """The rows with images and sounds left as bytes: pixels are opened when a batch is made, not before."""
    for column, feature in (rows.features or {}).items():
        if getattr(feature, "decode", False) is True:
            rows = rows.cast_column(column, replace(feature, decode=False))
    return rows


def _rows(rows: Any, start: int, path: str) -> Iterator[RawRecord]:
    if start and hasattr(rows, "__len__") and start >= len(rows):  # `skip` refuses what lies behind the end
        return iter(())
    rows = rows.skip(start) if start else rows
    return read_one(Path(path), ((f"row {number}", row) for number, row in enumerate(rows, start + 1)))


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

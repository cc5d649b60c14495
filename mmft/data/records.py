"""Records to samples to segments: a source is read, a data map understands, image paths are resolved.

A record that cannot be read is not an exception here but its reason, so that whoever iterates can count it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mmft.config import Dataset
from mmft.data.tokenize import Tokenizer, document_segments
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate, DataMap
from mmft.types import Document, Image, Message, RawRecord, Sample, Segment, Text

NOT_FOUND = "image not found: "


def iterate_records(dataset: Dataset, plugins: Plugins, start: int = 0) -> Iterator[tuple[int, RawRecord]]:
    """(number from 1, record) of one dataset, in order, without the first `start`."""
    source = plugins.datasets.get(dataset.source.name)
    if start and source.load_from:
        records = iter(source.load_from(start, **dataset.source.options))
    else:
        records = islice(source.load(**dataset.source.options), start, None)
    left = None if dataset.limit is None else max(0, dataset.limit - start)
    return enumerate(islice(records, left), start=start + 1)


def iterate_samples(
    dataset: Dataset, plugins: Plugins, start: int = 0
) -> Iterator[tuple[int, RawRecord, Sample | str]]:
    """(record number, record, sample or the reason there is none) of one dataset, in order."""
    data_map = plugins.data_maps.get(dataset.data_map)
    system = plugins.system_texts.get(dataset.system_text).text if dataset.system_text else dataset.system
    for number, record in iterate_records(dataset, plugins, start):
        try:
            yield number, record, _sample_of(record, dataset, data_map, system)
        except DataError as error:
            yield number, record, str(error)
        except Exception as error:  # a map is somebody's code: whatever it raises belongs to the record and the map
            yield number, record, f"data map {data_map.name!r} failed: {type(error).__name__}: {error}"


def _sample_of(record: RawRecord, dataset: Dataset, data_map: DataMap, system: str | None) -> Sample | str:
    sample = data_map.fn(record)
    if sample is None:
        return "nothing to train"
    if isinstance(sample, Document):
        return sample
    messages = sample.messages
    if any(part.__class__ is Image for message in messages for part in message.parts):
        messages = tuple(_with_paths(message, dataset.image_folder) for message in messages)
    if system is not None and not any(message.role == "system" for message in messages):
        messages = (Message("system", (Text(system),)), *messages)
    return sample if messages is sample.messages else replace(sample, messages=messages)


def _with_paths(message: Message, folder: Path | None) -> Message:
    """Resolve the image paths of a message; they may not lead out of the image folder, and the files must exist."""
    if not message.images:
        return message
    return replace(message, parts=tuple(_resolved(p, folder) if isinstance(p, Image) else p for p in message.parts))


def _resolved(image: Image, folder: Path | None) -> Image:
    source = str(image.source)
    if "://" in source:
        raise DataError(f"image is a remote address: {source}; only local files are read")
    path = source if folder is None else os.path.normpath(folder / source)
    if folder is not None and Path(os.path.relpath(path, folder)).parts[:1] == ("..",):  # is_relative_to(".") is not it
        raise DataError(f"image path leaves the image folder: {source}")
    if not os.path.isfile(path):  # noqa: PTH113 - a stat each for millions of records, and Path costs twice that
        raise DataError(f"{NOT_FOUND}{path}")
    return Image(path)


def render_sample(sample: Sample, template: ChatTemplate, tokenizer: Tokenizer) -> Sequence[Segment]:
    """The segments of a sample: a conversation through its template, a document as it is."""
    if isinstance(sample, Document):
        return document_segments(sample, tokenizer)
    return template.render(sample)

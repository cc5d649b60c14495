"""`mmft data check FILE`: what a data file is and what is wrong with it, before there is a config or a model."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from mmft.config import LLM, Dataset, use
from mmft.data.check import (
    NOTHING,
    bad_image_outcomes,
    describe_duplicates,
    image_facts,
    look_at_images,
    share_of,
)
from mmft.data.check_report import CheckReport, count_outcomes
from mmft.data.formats import SOURCES as RECORD_SOURCES
from mmft.data.formats import looks_like_all
from mmft.data.measure import duplicates, hash_text, histogram
from mmft.data.records import iterate_records, iterate_samples, render_sample
from mmft.data.shape import load_hf_tokenizer
from mmft.data.store import Drop
from mmft.data.tokenize import IMAGE_TOKEN, Tokenizer, tokenize_batch
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, RawRecord, Sample, Text

# What a suffix is read with, unless `source` says otherwise: records, and what holds documents or pictures.
SOURCES = {**RECORD_SOURCES, ".txt": "text", ".md": "text", ".tar": "webdataset"}
CHUNK = 512  # records tokenised at a time
LOOK = 20  # records a format is recognised by


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How a file is to be checked; None means: find out, or leave out."""

    data_map: str | None = None
    source: str | None = None
    image_folder: Path | None = None
    llm: str | None = None  # a path with a tokenizer, for lengths in tokens
    chat_template: str = "auto"
    max_bad_fraction: float = 0.01
    decode: bool = False


@dataclass
class _Seen:
    """What is gathered while the records go by."""

    num_records: int = 0
    num_samples: int = 0
    num_turns: int = 0
    num_marks: int = 0
    unequal: list[int] = field(default_factory=list)  # records whose marks and images differ in number
    drops: list[Drop] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    hashes: list[np.uint64] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # the record each of the three lists above tells of
    images: list[str] = field(default_factory=list)
    stopped: str = ""  # the source's own error, which ends the reading


def is_data_file(reference: str) -> bool:
    """Whether a command's argument is data and not a config: by suffix, and for .json by what is in it."""
    path = Path(reference)
    if path.suffix.lower() != ".json":
        return path.suffix.lower() in SOURCES
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    return not (head.startswith("{") and {'"model"', '"data"', '"optim"'} <= set(re.findall(r'"\w+"', head)))


def check_file(path: Path, plugins: Plugins, options: FileOptions, progress: Progress) -> CheckReport:
    """Read every record of a file through its map and report.

    Raises `DataError` where the file is missing, empty, or of no known format, or the image folder is not there.
    """
    if options.image_folder and not options.image_folder.is_dir():
        raise DataError(f"--image-folder: {options.image_folder} is not a folder; give where the image paths start")
    dataset, recognised = _as_dataset(path, plugins, options)
    lengths = _token_lengths(options, plugins) if options.llm else None
    seen = _read(dataset, plugins, lengths, progress)
    images = look_at_images(seen.images if options.image_folder else [], progress, decode=options.decode)
    problems = [seen.stopped] if seen.stopped else []
    blind = sum(drop.action == "dropped" for drop in seen.drops)
    if not seen.num_samples:
        problems.append("no record can be trained on")
    elif blind > options.max_bad_fraction * seen.num_records:
        problems.append(
            f"{blind:,} of {seen.num_records:,} records ({blind / seen.num_records:.1%}) cannot be trained on with the "
            f"data map {dataset.data_map!r}; at most {options.max_bad_fraction:.1%} is allowed (--max-bad-fraction)"
        )
    missing = sum(drop.reason.startswith("image") for drop in seen.drops) if options.image_folder else 0
    if images.bad or missing:
        problems.append(f"{len(images.bad) + missing:,} images cannot be read; see bad_images.jsonl and dropped.jsonl")
    facts = [("format", recognised), *_facts(seen)]
    if seen.images or seen.num_marks:
        facts += _image_facts(seen, options)
        facts += image_facts(images, len(seen.images)) if options.image_folder else ()
    unit = "characters" if lengths is None else f"tokens of {options.llm}, pictures not counted"
    return CheckReport(
        subject=str(path),
        facts=tuple(facts),
        outcomes=count_outcomes(seen.drops),
        lengths=histogram(seen.characters if lengths is None else seen.tokens, unit),
        images=images,
        bad_images=tuple(bad_image_outcomes(images)),
        problems=tuple(problems),
        drops=tuple(seen.drops),
    )


def _as_dataset(path: Path, plugins: Plugins, options: FileOptions) -> tuple[Dataset, str]:
    """The file as a dataset of a config, and what its format was recognised by."""
    source = options.source or SOURCES.get(path.suffix.lower(), "")
    if source not in plugins.datasets.names():
        known = ", ".join(plugins.datasets.names())
        raise DataError(f"{path}: no data source reads {path.suffix!r}; name one with --source: {known}")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    named = options.data_map
    unread = Dataset(source=use(source, path=str(path)), data_map=named or "", image_folder=options.image_folder)
    records = _first_records(unread, plugins)
    if not records:
        raise DataError(f"{path}: has no records")
    found = looks_like_all(records, plugins)
    names = [data_map.name for data_map, _ in found]
    if named:
        plugins.data_maps.get(named)  # an unknown name is refused here, once, with what there is
        other = "" if not found or named in names else f"; it looks like {names[0]}: {found[0][1]}"
        return unread, f"{named}, as --data-map says{other}"
    if not found:
        keys = ", ".join(map(str, records[0]))
        known = ", ".join(plugins.data_maps.names())
        raise DataError(f"{path}: no data map knows records with the keys {keys}; name one with --data-map: {known}")
    also = f"; also possible with --data-map: {', '.join(names[1:4])}" if len(names) > 1 else ""
    return unread.model_copy(update={"data_map": names[0]}), f"looks like {names[0]}: {found[0][1]}{also}"


def _first_records(dataset: Dataset, plugins: Plugins) -> list[RawRecord]:
    """The records a format is recognised by; an error after the first of them is met again by the reading."""
    records: list[RawRecord] = []
    try:
        for _, record in islice(iterate_records(dataset, plugins), LOOK):
            records.append(record)
    except DataError:
        if not records:
            raise
    return records


def _read(
    dataset: Dataset, plugins: Plugins, lengths: Callable[[list[Sample]], list[int]] | None, progress: Progress
) -> _Seen:
    """Every record once; an error of the source ends the reading and is kept."""
    seen, task = _Seen(), progress.add_task("records", total=None)
    samples = iterate_samples(dataset, plugins) if dataset.image_folder else _unresolved(dataset, plugins)
    waiting: list[Sample] = []
    try:
        for one in samples:
            sample = _see(seen, dataset, *one)
            waiting += [sample] if lengths and sample is not None else []
            if seen.num_records % CHUNK == 0:
                progress.update(task, completed=seen.num_records)
                seen.tokens += lengths(waiting) if lengths else ()
                waiting = []
    except DataError as error:
        seen.stopped = f"reading stopped after {seen.num_records:,} records: {error}"
    seen.tokens += lengths(waiting) if lengths else ()
    return seen


def _unresolved(dataset: Dataset, plugins: Plugins) -> Iterator[tuple[int, RawRecord, Sample | str]]:
    """As `iterate_samples`, for a file whose image folder is not known: no image is looked for."""
    data_map = plugins.data_maps.get(dataset.data_map)
    for number, record in iterate_records(dataset, plugins):
        try:
            yield number, record, data_map.fn(record) or NOTHING
        except DataError as error:
            yield number, record, str(error)
        except Exception as error:  # a map is somebody's code: whatever it raises belongs to the record and the map
            yield number, record, f"data map {data_map.name!r} failed: {type(error).__name__}: {error}"


def _see(seen: _Seen, dataset: Dataset, number: int, record: RawRecord, sample: Sample | str) -> Sample | None:
    """Count one record; returns its sample, if it has one."""
    seen.num_records += 1
    name = str(record.get("id", "")) if isinstance(record, Mapping) else ""
    where = str(dataset.source.options["path"])
    if isinstance(sample, str):
        seen.drops.append(Drop(where, number, name, sample))
        return None
    seen.num_samples += 1
    seen.numbers.append(number)
    images: tuple[Image, ...] = ()
    if isinstance(sample, Conversation):
        seen.drops += (Drop(where, number, name, note, "repaired") for note in sample.notes)
        seen.num_turns += len(sample.messages)
        images = sample.images
        text = "\0".join(m.role + "\1" + "".join(map(_spelled, m.parts)) + "".join(map(str, m.tool_calls))
                         for m in sample.messages)  # fmt: skip
        seen.characters.append(sum(len(message.text) for message in sample.messages))
    else:
        text = sample.text
        seen.characters.append(len(text))
    marks = _count_marks(record)
    seen.num_marks += marks
    if marks != len(images):
        seen.unequal.append(number)
    seen.images += (str(image.source) for image in images)
    seen.hashes.append(hash_text(text))
    return sample


def _spelled(part: Text | Image) -> str:
    return part.text if isinstance(part, Text) else f"\2{part.source}\2"


def _count_marks(value: Any) -> int:
    if isinstance(value, str):
        return value.count(IMAGE_TOKEN)
    if isinstance(value, Mapping):
        return sum(map(_count_marks, value.values()))
    return sum(map(_count_marks, value)) if isinstance(value, list | tuple) else 0


def _facts(seen: _Seen) -> Iterator[tuple[str, str]]:
    yield "records", f"{seen.num_records:,}, {seen.num_samples:,} can be trained on"
    if seen.num_turns:
        yield "turns", f"{seen.num_turns:,}, {seen.num_turns / seen.num_samples:.1f} a record"
    yield "not trained", share_of(sum(d.reason.startswith(NOTHING) for d in seen.drops), seen.num_records)
    yield "characters", f"{sum(seen.characters):,}"
    if seen.tokens:
        yield "tokens", f"{sum(seen.tokens):,}"
    found = duplicates(np.array(seen.hashes, np.uint64))
    yield "duplicates", describe_duplicates(found, seen.num_samples, lambda item: f"record {seen.numbers[item]:,}")


def _image_facts(seen: _Seen, options: FileOptions) -> Iterator[tuple[str, str]]:
    where = f"; they differ in {len(seen.unequal):,} records, first record {seen.unequal[0]:,}" if seen.unequal else ""
    yield "image marks", f"{seen.num_marks:,} {IMAGE_TOKEN} marks, {len(seen.images):,} images{where}"
    if not options.image_folder:
        yield "images", f"{len(set(seen.images)):,} files, not opened; say where they are with --image-folder"


def _token_lengths(options: FileOptions, plugins: Plugins) -> Callable[[list[Sample]], list[int]]:
    """A function that counts the tokens of samples as they are trained, without their pictures."""
    assert options.llm is not None
    tokenizer = Tokenizer.for_model(load_hf_tokenizer(options.llm, LLM(path=options.llm)))
    template = plugins.chat_templates.get(options.chat_template).for_tokenizer(tokenizer.hf)
    return lambda samples: _lengths(samples, template, tokenizer)


def _lengths(samples: Iterable[Sample], template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    rendered = []
    for sample in samples:
        try:
            segments = render_sample(sample, template, tokenizer)
        except DataError:  # this template does not take this conversation; its own check says so
            continue
        rendered.append([segment for segment in segments if not isinstance(segment.content, Image)])
    return [len(tokenized) for tokenized in tokenize_batch(rendered, tokenizer)]

"""`mmft data check FILE`: what a data file is and what is wrong with it, before there is a config or a model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from mmft.config import LLM, Dataset
from mmft.data.check import (
    NOTHING,
    bad_image_outcomes,
    describe_duplicates,
    image_facts,
    look_at_images,
    share_of,
)
from mmft.data.check_report import CheckReport, count_outcomes
from mmft.data.formats import LOOKED, added_text, looks_like_all, probe, source_use
from mmft.data.measure import duplicates, hash_text, histogram
from mmft.data.records import iterate_records, iterate_samples, render_sample, unwritten_thoughts
from mmft.data.shape import load_hf_tokenizer
from mmft.data.store import Drop
from mmft.data.tokenize import IMAGE_TOKEN, Tokenizer, refuse_surrogates, tokenize_batch
from mmft.errors import DataError
from mmft.foreign_paths import windows_hint
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate
from mmft.types import BadRecord, Conversation, Image, Message, RawRecord, Sample, Segment, Text

CHUNK = 512  # records tokenised at a time
FIRST = 3  # records that cannot be read that are told where all are such
IMAGE_COLUMNS = ("image", "images")  # where a record of any format has its pictures
NOT_RENDERED = "not rendered"  # the action of a record that the chat template refuses


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How a file is to be checked; None means: find out, or leave out."""

    data_map: str | None = None
    source: str | None = None
    source_options: Mapping[str, Any] = field(default_factory=dict)
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
    unread: list[int] = field(default_factory=list)  # records with an image column of which the map read no image
    lost_marks: int = 0  # <image> marks of those, which stay as text
    drops: list[Drop] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    hashes: list[np.uint64] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # the record each of the three lists above tells of
    images: list[str] = field(default_factory=list)
    stopped: str = ""  # the source's own error, which ends the reading

    def count(self, *actions: str) -> int:
        """The records that went one of these ways."""
        return sum(drop.action in actions for drop in self.drops)


@dataclass(frozen=True)
class _Recognised:
    """A file as a dataset of a config: how its format was found, what else would fit best, what its map adds."""

    dataset: Dataset
    how: str
    better: str = ""  # "; this looks like ..." where the map was named and another comes first
    adds: str = ""  # a system text that no record has


@dataclass(frozen=True)
class _Lengths:
    """Counts the tokens of samples as they are trained, without their pictures."""

    template: ChatTemplate
    tokenizer: Tokenizer

    def render(self, sample: Sample) -> list[Segment]:
        """Raises `DataError` where the template has no form for the sample."""
        segments = render_sample(sample, self.template, self.tokenizer)
        return [segment for segment in segments if not isinstance(segment.content, Image)]

    def count(self, rendered: list[list[Segment]]) -> list[int]:
        """The tokens of each sample."""
        return [len(tokenized) for tokenized in tokenize_batch(rendered, self.tokenizer)]


def check_file(path: Path, plugins: Plugins, options: FileOptions, progress: Progress) -> CheckReport:
    """Read every record of a file through its map and report.

    Raises `DataError` where the file is missing, empty, or of no known format, or the image folder is not there.
    """
    if options.image_folder and not options.image_folder.is_dir():
        raise DataError(f"--image-folder: {options.image_folder} is not a folder; give where the image paths start")
    found = _recognise(path, plugins, options)
    dataset = found.dataset
    lengths = _token_lengths(options, plugins) if options.llm else None
    seen = _read(dataset, plugins, lengths, progress)
    images = look_at_images(seen.images if options.image_folder else [], progress, decode=options.decode)
    problems = list(_problems(seen, found, options))
    missing = sum(drop.reason.startswith("image") for drop in seen.drops) if options.image_folder else 0
    if images.bad or missing:
        problems.append(f"{len(images.bad) + missing:,} images cannot be read; see bad_images.jsonl and dropped.jsonl")
    facts = [("format", found.how), *([("system text", f"adds the system text {found.adds!r}")] if found.adds else [])]
    facts += _facts(seen)
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
        unopened=0 if options.image_folder else len(set(seen.images)),
    )


def _problems(seen: _Seen, found: _Recognised, options: FileOptions) -> Iterator[str]:
    """Why the records of a file cannot be trained on as they are."""
    if seen.stopped:
        yield seen.stopped
    refused = seen.count(NOT_RENDERED)
    blind = refused + seen.count("dropped")
    if not seen.num_samples:
        yield "no record can be trained on"
    elif blind > options.max_bad_fraction * seen.num_records:
        because = f", {refused:,} of them since the chat template cannot render them" if refused else ""
        yield (
            f"{blind:,} of {seen.num_records:,} records ({blind / seen.num_records:.1%}) cannot be trained on with the "
            f"data map {found.dataset.data_map!r}{because}; at most {options.max_bad_fraction:.1%} is allowed "
            "(--max-bad-fraction)"
        )
    if seen.unread:
        marks = f", and {seen.lost_marks:,} {IMAGE_TOKEN} marks stay as text" if seen.lost_marks else ""
        yield (
            f"{len(seen.unread):,} records have pictures (first record {seen.unread[0]:,}) that the data map "
            f"{found.dataset.data_map!r} does not read{marks}{found.better}"
        )


def _recognise(path: Path, plugins: Plugins, options: FileOptions) -> _Recognised:
    """The file as a dataset of a config, and what its format was recognised by."""
    source = source_use(path, plugins, options.source, options.source_options)
    files = plugins.datasets.get(source.name).files
    for file in files(**source.options) if files else ():
        if not Path(file).exists():
            hint = windows_hint(str(file))
            raise DataError(f"{file}: no such file{hint and f'; {hint}'}")
    named = options.data_map
    unread = Dataset(source=source, data_map=named or "", image_folder=options.image_folder)
    records = _first_records(unread, plugins)
    fitting = looks_like_all(records, plugins)
    names = [data_map.name for data_map, _ in fitting]
    if named:
        chosen = plugins.data_maps.get(named)  # an unknown name is refused here, once, with what there is
        better = f"; it looks like {names[0]}: {fitting[0][1]}" if fitting and fitting[0][0].fn is not chosen.fn else ""
        how = f"{named}, as --data-map says{'' if named in names else better}"
        return _Recognised(unread, how, better, added_text(chosen, records))
    if not fitting:
        keys = ", ".join(map(str, records[0]))
        known = ", ".join(plugins.data_maps.names())
        raise DataError(f"{path}: no data map knows records with the keys {keys}; name one with --data-map: {known}")
    also = f"; also possible with --data-map: {', '.join(names[1:4])}" if len(names) > 1 else ""
    dataset = unread.model_copy(update={"data_map": names[0]})
    adds = added_text(fitting[0][0], records)
    return _Recognised(dataset, f"looks like {names[0]}: {fitting[0][1]}{also}", adds=adds)


def _first_records(dataset: Dataset, plugins: Plugins) -> list[RawRecord]:
    """The records a format is recognised by; an error after the first of them is met again by the reading.

    Raises `DataError` where there are none, or none that can be read.
    """
    bad: list[str] = []
    number = 0

    def noted() -> Iterator[RawRecord | BadRecord]:
        nonlocal number
        for number, record in iterate_records(dataset, plugins):
            if isinstance(record, BadRecord) and len(bad) < FIRST:
                bad.append(f"\n    record {number:,}: {record.reason}")
            yield record

    records = probe(noted())
    where = dataset.source.options["path"]
    if not records and bad:
        many = f"first {number:,}" if number == LOOKED else f"{number:,}"
        raise DataError(f"{where}: none of the {many} records can be read. The first ones:{''.join(bad)}")
    if not records:
        raise DataError(f"{where}: has no records")
    return records


def _read(dataset: Dataset, plugins: Plugins, lengths: _Lengths | None, progress: Progress) -> _Seen:
    """Every record once; an error of the source ends the reading and is kept."""
    seen, task = _Seen(), progress.add_task("records", total=None)
    samples = iterate_samples(dataset, plugins, find_images=dataset.image_folder is not None)
    waiting: list[list[Segment]] = []
    try:
        for one in samples:
            _see(seen, dataset, *one, lengths=lengths, waiting=waiting)
            if seen.num_records % CHUNK == 0:
                progress.update(task, completed=seen.num_records)
                seen.tokens += lengths.count(waiting) if lengths else ()
                waiting.clear()
    except DataError as error:
        seen.stopped = f"reading stopped after {seen.num_records:,} records: {error}"
    seen.tokens += lengths.count(waiting) if lengths else ()
    return seen


def _see(
    seen: _Seen,
    dataset: Dataset,
    number: int,
    record: RawRecord,
    sample: Sample | str,
    *,
    lengths: _Lengths | None,
    waiting: list[list[Segment]],
) -> None:
    """Count one record; what its template makes of it waits for the tokenizer."""
    seen.num_records += 1
    name = str(record.get("id", "")) if isinstance(record, Mapping) else ""
    where = str(dataset.source.options["path"])
    sample = _checked(sample)
    if isinstance(sample, str):
        seen.drops.append(Drop(where, number, name, sample))
        return
    if lengths:
        try:
            waiting.append(lengths.render(sample))
            if note := unwritten_thoughts(sample, waiting[-1], lengths.template):
                seen.drops.append(Drop(where, number, name, note, "repaired"))
        except DataError as error:
            seen.drops.append(Drop(where, number, name, str(error), NOT_RENDERED))
            return
    seen.num_samples += 1
    seen.numbers.append(number)
    images: tuple[Image, ...] = ()
    if isinstance(sample, Conversation):
        seen.drops += (Drop(where, number, name, note, "repaired") for note in sample.notes)
        seen.num_turns += len(sample.messages)
        images = sample.images
        text = "\0".join(map(_spelled_out, sample.messages))
        seen.characters.append(sum(len(message.text) for message in sample.messages))
    else:
        text = sample.text
        seen.characters.append(len(text))
    marks = _count_marks(record)
    seen.num_marks += marks
    if marks != len(images):
        seen.unequal.append(number)
    if not images and any(record.get(column) for column in IMAGE_COLUMNS):
        seen.unread.append(number)
        seen.lost_marks += marks
    seen.images += (str(image.source) for image in images)
    seen.hashes.append(hash_text(text))


def _checked(sample: Sample | str) -> Sample | str:
    """The sample, or why no tokenizer can encode it."""
    if isinstance(sample, str):
        return sample
    messages = sample.messages if isinstance(sample, Conversation) else (sample,)
    try:
        for text in (message.text for message in messages):
            if not text.isascii():
                refuse_surrogates(text)
    except DataError as error:
        return str(error)
    return sample


def _spelled_out(message: Message) -> str:
    """What two messages must have in common to be the same; the ids of calls mean nothing."""
    calls = (f"{call.name}{call.arguments}" for call in message.tool_calls)
    return "".join([message.role, "\1", *map(_spelled, message.parts), *calls])


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
    if seen.num_marks:
        yield "image marks", f"{seen.num_marks:,} {IMAGE_TOKEN} marks, {len(seen.images):,} images{where}"
    else:  # the format says otherwise where its pictures belong
        yield "image marks", f"{len(seen.images):,} images, placed by the data map: no record has {IMAGE_TOKEN} marks"
    if not options.image_folder:
        yield "images", f"{len(set(seen.images)):,} files, not opened; say where they are with --image-folder"


def _token_lengths(options: FileOptions, plugins: Plugins) -> _Lengths:
    assert options.llm is not None
    tokenizer = Tokenizer.for_model(load_hf_tokenizer(options.llm, LLM(path=options.llm)))
    return _Lengths(plugins.chat_templates.get(options.chat_template).for_tokenizer(tokenizer.hf), tokenizer)

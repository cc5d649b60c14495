"""Records to a token store: every record is read once, and what is dropped is counted and listed with its reason.

`prepare()` runs sources, maps, template and tokenizer over all datasets of a config and keeps the result in flat arrays
on disk, memory-mapped. The folder's name is a digest of everything the result depends on, so a change in data, map,
template, tokenizer or version builds a new one. Chunks of records are tokenised in a second thread: Rust needs no GIL,
so reading and rendering the next chunk in Python costs no time of its own.
"""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmft.config import Data, Dataset
from mmft.data.cut import split, truncate
from mmft.data.digest import digest_of
from mmft.data.files import META, StoreWriter, open_store, source_name
from mmft.data.formats import format_hint
from mmft.data.image_paths import is_mended
from mmft.data.records import (
    bound_template,
    history_note,
    iterate_records,
    iterate_samples,
    render_sample,
    unwritten_thoughts,
)
from mmft.data.store import DROPPED, REPAIRED, REPLACED, Drop, TokenStore, drop_summary
from mmft.data.tokenize import Piece, TokenizedChunk, Tokenizer, encode_pieces, pieces_of
from mmft.data.visible import one_line
from mmft.errors import ConfigError, DataError, Problem
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Document, RawRecord, Sample, TokenizedSample

CHUNK = 1000  # records a call into the tokenizer
SHOWN = 1000  # characters of a record's reason in an error; it quotes data, which must not act on a screen
AHEAD = 2  # chunks that wait for the tokenizer while Python reads on


def prepare(
    data: Data,
    plugins: Plugins,
    tokenizer: Tokenizer,
    cache_dir: Path,
    report: Callable[[str], None] = lambda _: None,
    *,
    refuse: bool = True,
    seed: int = 0,
) -> TokenStore:
    """The token store of a config, from the cache where nothing it depends on has changed.

    `seed` chooses what stands in for dropped records under `on_bad_sample="replace"`. Raises `DataError` when more than
    `max_bad_fraction` of the records are dropped, or nothing is left; not with `refuse=False`, for whoever wants to see
    what there is.
    """
    template = bound_template(data.chat_template, plugins, tokenizer)
    folder = cache_dir / f"tokens-{digest_of(data, plugins, tokenizer, template, cache_dir)}"
    if not (folder / META).is_file() or _images_appeared(open_store(folder, data, seed).drops):
        report(f"tokenising {len(data.datasets)} dataset(s) into {folder}")
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            _build(temporary, data, plugins, tokenizer, template, refuse=refuse)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    else:
        report(f"token store: {folder} (unchanged)")
    if note := history_note(template):
        report(note)
    store = open_store(folder, data, seed)
    if refuse:
        if data.on_bad_sample == "error":
            for drop in store.drops:
                _refuse_bad(drop, data)
        _refuse_too_many_drops(store, data, plugins)
    return store


def _images_appeared(drops: Iterable[Drop]) -> bool:
    """Whether an image that was missing when the store was built is there now: its record must not stay dropped."""
    return any(is_mended(drop.reason) for drop in drops)


def _refuse_too_many_drops(store: TokenStore, data: Data, plugins: Plugins) -> None:
    gone = (DROPPED, REPLACED)
    number = sum(drop.action in gone for drop in store.drops)
    if not len(store) or number > data.max_bad_fraction * store.num_records:
        summary = drop_summary((drop for drop in store.drops if drop.action in gone), store.num_records)
        first = list(islice((drop for drop in store.drops if drop.action in gone), 3))
        listed = "".join(f"\n    {one_line(str(drop), SHOWN)}" for drop in first)
        hint = "; ".join(format_hints(data, plugins, store.drops))
        raise DataError(
            f"{summary or 'the datasets are empty'}; at most {data.max_bad_fraction:.1%} is allowed "
            f"(data.max_bad_fraction){f'; {hint}' if hint else ''}. The first ones:{listed}"
        )


def format_hints(data: Data, plugins: Plugins, drops: Iterable[Drop] | None = None) -> tuple[str, ...]:
    """For each dataset, of those with dropped records: which data map would read them where its own refuses some."""
    sources = None if drops is None else {drop.source for drop in drops if drop.action in (DROPPED, REPLACED)}
    found = []
    for number, dataset in enumerate(data.datasets):
        if sources is None or source_name(dataset) in sources:
            records = (record for _, record in iterate_records(dataset, plugins))
            try:
                hint = format_hint(plugins.data_maps.get(dataset.data_map), records, plugins)
            except DataError:  # the source fails, which is told already
                continue
            where = f"data.datasets.{number}: " if len(data.datasets) > 1 else ""
            found += [f"{where}{hint}"] if hint else []
    return tuple(found)


def _refuse_bad(drop: Drop, data: Data) -> None:
    """Stop at a bad record where the config says so; `too_long="drop"` is a choice, and no bad record."""
    if data.on_bad_sample == "error" and drop.action == DROPPED and not drop.reason.startswith(TOO_LONG):
        raise DataError(f"{one_line(str(drop), SHOWN)} (data.on_bad_sample is 'error')")


def _build(
    temporary: Path, data: Data, plugins: Plugins, tokenizer: Tokenizer, template: ChatTemplate, *, refuse: bool
) -> None:
    """Write the store to a temporary folder, which is renamed when it is complete."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with StoreWriter(temporary) as writer:
        for dataset in data.datasets:
            writer.begin_dataset()
            for chunk in tokenized_chunks(iterate_samples(dataset, plugins), dataset, data, template, tokenizer):
                for drop in chunk.drops if refuse else ():
                    _refuse_bad(drop, data)
                writer.num_records += chunk.num_records
                writer.add(chunk.samples, chunk.records, chunk.trained, chunk.drops, chunk.lengths)
        writer.finish()


@dataclass(slots=True)
class Rendered:
    """A chunk of records on the way to the tokenizer: what is kept, and what became of the rest."""

    source: str
    num_records: int
    pieces: list[list[Piece]] = field(default_factory=list)
    kept: list[tuple[int, RawRecord, Sample]] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)

    def note(self, number: int, record: RawRecord, reason: str, action: str = DROPPED) -> None:
        """List a record that is not trained as it was given."""
        self.drops.append(Drop(self.source, number, _id_of(record), reason, action))


def _id_of(record: RawRecord) -> str:
    """The id of a record; of one without, the file it is, as the source `text` says."""
    if not isinstance(record, Mapping):
        return ""
    path = record.get("path")
    return str(record.get("id", path if isinstance(path, str) else ""))


@dataclass(frozen=True, slots=True)
class FittedChunk:
    """Samples that fit: int64[S] record numbers, int64[S] targets of each, and what became of other records.

    `lengths` are int64[R]: the tokens of each record that was tokenised, as it is, before any was cut or dropped.
    """

    samples: TokenizedChunk
    records: NDArray[np.int64]
    trained: NDArray[np.int64]
    drops: list[Drop]
    num_records: int
    lengths: NDArray[np.int64]


def tokenized_chunks(
    samples: Iterable[tuple[int, RawRecord, Sample | str]],
    dataset: Dataset,
    data: Data,
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> Iterator[FittedChunk]:
    """Chunks of a dataset's records, in order, tokenised and cut to `max_length`."""
    waiting: deque[tuple[Rendered, Future[TokenizedChunk]]] = deque()
    iterator = iter(samples)
    with ThreadPoolExecutor(1, "tokenizer") as rust:
        while chunk := list(islice(iterator, CHUNK)):
            rendered = _render_chunk(chunk, source_name(dataset), template, tokenizer)
            waiting.append((rendered, rust.submit(encode_pieces, rendered.pieces, tokenizer)))
            if len(waiting) > AHEAD:
                rendered, encoded = waiting.popleft()
                yield _fitted(rendered, encoded.result(), data, tokenizer)
        while waiting:
            rendered, encoded = waiting.popleft()
            yield _fitted(rendered, encoded.result(), data, tokenizer)


def _render_chunk(
    chunk: list[tuple[int, RawRecord, Sample | str]], source: str, template: ChatTemplate, tokenizer: Tokenizer
) -> Rendered:
    rendered = Rendered(source, len(chunk))
    for number, record, sample in chunk:
        try:
            if isinstance(sample, str):
                raise DataError(sample)
            if tokenizer.image_id is None and isinstance(sample, Conversation) and sample.images:
                raise DataError("has an image, but the model has no vision encoder")
            segments = render_sample(sample, template, tokenizer)
            rendered.pieces.append(pieces_of(segments, tokenizer))
            if isinstance(sample, Conversation) and (note := unwritten_thoughts(sample, segments, template)):
                sample = replace(sample, notes=(*sample.notes, note))
            rendered.kept.append((number, record, sample))
        except DataError as error:
            rendered.note(number, record, str(error))
        except ConfigError as error:  # it is not the record that is wrong
            found = (Problem(one.where, f"{one.what} (needed by {source} record {number:,})") for one in error.problems)
            raise ConfigError(list(found)) from error
    return rendered


TOO_LONG = "longer than "


def _fitted(rendered: Rendered, chunk: TokenizedChunk, data: Data, tokenizer: Tokenizer) -> FittedChunk:
    """The samples that are trained, at most `max_length` long; the others are listed."""
    records = np.fromiter((number for number, _, _ in rendered.kept), np.int64, len(rendered.kept))
    trained = count_trained(chunk.loss, chunk.offsets)
    lengths = np.diff(chunk.offsets)
    fits = (lengths <= data.max_length) & (trained > 0)
    dropped: set[int] = set()
    if not fits.all():
        pieces: list[TokenizedSample] = []
        numbers: list[int] = []
        for sample, (number, record, given) in enumerate(rendered.kept):
            fitting = [chunk[sample]]
            if not fits[sample]:
                fitting = _cut_to_fit(chunk[sample], number, record, given, rendered, data, tokenizer)
            dropped |= set() if fitting else {number}
            pieces += fitting
            numbers += [number] * len(fitting)
        chunk, records = _together(pieces), np.array(numbers, np.int64)
        trained = count_trained(chunk.loss, chunk.offsets)
    for number, record, given in rendered.kept:
        for repair in given.notes if isinstance(given, Conversation) and number not in dropped else ():
            rendered.note(number, record, repair, REPAIRED)
    rendered.drops.sort(key=lambda drop: drop.record)
    return FittedChunk(chunk, records, trained, rendered.drops, rendered.num_records, lengths)


def _cut_to_fit(
    sample: TokenizedSample,
    number: int,
    record: RawRecord,
    given: Sample,
    rendered: Rendered,
    data: Data,
    tokenizer: Tokenizer,
) -> list[TokenizedSample]:
    """What is trained of a sample that is too long or has no target: pieces, or nothing."""
    pieces = [sample]
    reason = "nothing to train"
    if len(sample) > data.max_length:
        reason = f"{TOO_LONG}{data.max_length} tokens: {len(sample)}"
        if data.too_long == "error":
            raise DataError(f"{rendered.source} record {number:,}: {reason} (data.too_long is 'error')")
        if data.too_long == "drop":
            pieces = []
        elif data.too_long == "truncate":
            pieces = [truncate(sample, data.max_length, tokenizer)]
        else:
            pieces = split(sample, data.max_length, tokenizer)
    trained = [piece for piece in pieces if piece.loss_mask[1:].any()]
    if not trained:
        rendered.note(number, record, "nothing to train" if pieces else reason)
    elif data.too_long == "truncate":
        rendered.note(number, record, reason, "truncated")
    elif len(trained) < len(pieces) or not isinstance(given, Document):  # a document is meant to be split
        left_out = (
            f", {len(pieces) - len(trained)} of them without a target left out" if len(trained) < len(pieces) else ""
        )
        rendered.note(number, record, f"{reason}, in {len(pieces)} pieces{left_out}", "split")
    return trained


def _together(samples: list[TokenizedSample]) -> TokenizedChunk:
    """Samples one after another."""
    offsets = np.cumsum([0, *map(len, samples)], dtype=np.int64)
    ids = np.concatenate([np.empty(0, np.int32), *(sample.input_ids for sample in samples)])
    loss = np.concatenate([np.empty(0, np.bool_), *(sample.loss_mask for sample in samples)])
    return TokenizedChunk(ids, loss, offsets, [sample.images for sample in samples])


def count_trained(loss: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[S]: the targets of each sample; its first token has no context and is none."""
    counted = np.concatenate([[0], np.cumsum(loss, dtype=np.int64)])
    after_first = np.minimum(offsets[:-1] + 1, offsets[1:])
    trained: NDArray[np.int64] = counted[offsets[1:]] - counted[after_first]
    return trained

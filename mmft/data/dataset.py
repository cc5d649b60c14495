"""Records to a token store: every record is read once, and what is dropped is counted and listed with its reason.

`prepare()` runs sources, maps, template and tokenizer over all datasets of a config and keeps the result in flat arrays
on disk, memory-mapped. The folder's name is a digest of everything the result depends on, so a change in data, map,
template, tokenizer or version builds a new one.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmft import __version__
from mmft.config import Data, Dataset
from mmft.data.records import NOT_FOUND, iterate_samples, render_sample
from mmft.data.store import Drop, TokenStore, drop_summary
from mmft.data.tokenize import Tokenizer, tokenize_batch
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate
from mmft.types import (
    Conversation,
    RawRecord,
    Sample,
    Segment,
    TokenizedSample,
)

CHUNK = 1000  # records a call into the tokenizer


def prepare(
    data: Data, plugins: Plugins, tokenizer: Tokenizer, cache_dir: Path, report: Callable[[str], None] = lambda _: None
) -> TokenStore:
    """The token store of a config, from the cache where nothing it depends on has changed.

    Raises `DataError` when more than `max_bad_fraction` of the records are dropped, or nothing is left.
    """
    template = plugins.chat_templates.get(data.chat_template).for_tokenizer(tokenizer.hf)
    digest = _digest(data, plugins, tokenizer, template)
    folder = cache_dir / f"tokens-{digest}"
    if not (folder / "meta.json").is_file() or _images_appeared(folder):
        report(f"tokenising {len(data.datasets)} dataset(s) into {folder}")
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            _build(temporary, data, plugins, tokenizer, template)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    else:
        report(f"token store: {folder} (unchanged)")
    store = _open(folder, data)
    _refuse_too_many_drops(store, data)
    return store


def _images_appeared(folder: Path) -> bool:
    """Whether an image that was missing when the store was built is there now: its record must not stay dropped."""
    reasons = [drop[3] for drop in json.loads((folder / "meta.json").read_text("utf-8"))["drops"]]
    return any(Path(r.removeprefix(NOT_FOUND)).is_file() for r in reasons if r.startswith(NOT_FOUND))


def _refuse_too_many_drops(store: TokenStore, data: Data) -> None:
    dropped = [drop for drop in store.drops if drop.action == "dropped"]
    if not len(store) or len(dropped) > data.max_bad_fraction * store.num_records:
        first = "\n    ".join(str(drop) for drop in dropped[:3])
        raise DataError(
            f"{drop_summary(dropped, store.num_records) or 'the datasets are empty'}; at most "
            f"{data.max_bad_fraction:.1%} is allowed (data.max_bad_fraction). The first ones:\n    {first}"
        )


def _build(temporary: Path, data: Data, plugins: Plugins, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Write the store to a temporary folder, which is renamed when it is complete."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    lengths: list[int] = []
    images: list[list[str]] = []
    drops: list[Drop] = []
    counts: list[int] = []
    num_records = 0
    with (temporary / "ids.bin").open("wb") as ids_file, (temporary / "loss.bin").open("wb") as loss_file:
        for dataset in data.datasets:
            before = len(lengths)
            for chunk in _chunks(iterate_samples(dataset, plugins)):
                num_records += len(chunk)
                for sample in _tokenize_chunk(chunk, dataset, data, template, tokenizer, drops):
                    sample.input_ids.tofile(ids_file)
                    sample.loss_mask.tofile(loss_file)
                    lengths.append(len(sample))
                    images.append([str(image.source) for image in sample.images])
            counts.append(len(lengths) - before)
    np.save(temporary / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    meta = {
        "images": images,
        "counts": counts,
        "num_records": num_records,
        "drops": [[d.source, d.record, d.id, d.reason, d.action] for d in drops],
    }
    (temporary / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), "utf-8")


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _tokenize_chunk(
    chunk: list[tuple[int, RawRecord, Sample | str]],
    dataset: Dataset,
    data: Data,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    drops: list[Drop],
) -> Iterator[TokenizedSample]:
    """The tokenised samples of a chunk; what cannot be trained is added to `drops`."""
    kept: list[tuple[int, RawRecord]] = []
    rendered: list[Sequence[Segment]] = []

    def drop(number: int, record: RawRecord, reason: str, action: str = "dropped") -> None:
        drops.append(Drop(_source_name(dataset), number, _id_of(record), reason, action))

    for number, record, sample in chunk:
        try:
            if isinstance(sample, str):
                raise DataError(sample)
            if isinstance(sample, Conversation) and sample.images and tokenizer.image_id is None:
                raise DataError("has an image, but the model has no vision encoder")
            rendered.append(render_sample(sample, template, tokenizer))
            kept.append((number, record))
        except DataError as error:
            drop(number, record, str(error))
    for (number, record), tokenized in zip(kept, tokenize_batch(rendered, tokenizer), strict=True):
        if len(tokenized) > data.max_length:
            reason = f"longer than {data.max_length} tokens: {len(tokenized)}"
            if data.too_long == "error":
                raise DataError(f"{_source_name(dataset)} record {number:,}: {reason} (data.too_long is 'error')")
            if data.too_long == "drop":
                drop(number, record, reason)
                continue
            tokenized = truncate(tokenized, data.max_length, tokenizer)
            if tokenized.loss_mask[1:].any():
                drop(number, record, reason, "truncated")
        if not tokenized.loss_mask[1:].any():
            drop(number, record, "nothing to train")
            continue
        yield tokenized


def truncate(sample: TokenizedSample, max_length: int, tokenizer: Tokenizer) -> TokenizedSample:
    """The first `max_length` tokens; an image that would be cut is left out whole, with what follows it."""
    cut = max_length
    if sample.images:
        positions = np.flatnonzero(sample.input_ids == tokenizer.image_id)
        starts = positions[:: tokenizer.tokens_per_image]
        split = starts[(starts < cut) & (starts + tokenizer.tokens_per_image > cut)]
        cut = int(split[0]) if len(split) else cut
        kept = int((starts < cut).sum())
    else:
        kept = 0
    return TokenizedSample(sample.input_ids[:cut], sample.loss_mask[:cut], sample.images[:kept])


def _open(folder: Path, data: Data) -> TokenStore:
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    offsets = np.load(folder / "offsets.npy")
    total = int(offsets[-1])
    ids = np.memmap(folder / "ids.bin", np.int32, "r", shape=(total,)) if total else np.empty(0, np.int32)
    loss = np.memmap(folder / "loss.bin", np.bool_, "r", shape=(total,)) if total else np.empty(0, np.bool_)
    starts = np.concatenate([[0], np.cumsum(meta["counts"])])
    index = [
        np.tile(np.arange(starts[i], starts[i + 1]), int(dataset.repeat)) for i, dataset in enumerate(data.datasets)
    ]
    drops = tuple(Drop(*drop) for drop in meta["drops"])
    return TokenStore(ids, loss, offsets, meta["images"], np.concatenate(index), drops, meta["num_records"])


def _source_name(dataset: Dataset) -> str:
    return str(dataset.source.options.get("path", dataset.source.name))


def _id_of(record: RawRecord) -> str:
    return str(record.get("id", "")) if isinstance(record, Mapping) else ""


def _digest(data: Data, plugins: Plugins, tokenizer: Tokenizer, template: ChatTemplate) -> str:
    """Of everything the token store depends on, the code of map and template included."""
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps([str(value) for value in values]).encode())

    add(__version__, data.max_length, data.too_long, tokenizer.tokens_per_image, tokenizer.image_id)
    add(tokenizer.hf.backend_tokenizer.to_str(), tokenizer.hf.chat_template)
    add(tokenizer.hf.bos_token, tokenizer.hf.eos_token)
    add(template.name, plugins.chat_templates.owner(data.chat_template).distribution, _code_of(template.render))
    for dataset in data.datasets:
        source, data_map = plugins.datasets.get(dataset.source.name), plugins.data_maps.get(dataset.data_map)
        add(dataset.model_dump_json(exclude={"repeat"}), _code_of(source.load), _code_of(data_map.fn))
        add(plugins.data_maps.owner(dataset.data_map).distribution)
        for path in source.files(**dataset.source.options) if source.files else ():
            with Path(path).open("rb") as file:
                add(path, hashlib.file_digest(file, "sha256").hexdigest())
    return digest.hexdigest()[:16]


def _code_of(function: Any) -> str:
    """The source file a function comes from, hashed: an edited map must not meet a stale store."""
    while hasattr(function, "func"):
        function = function.func
    try:
        return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return repr(function)

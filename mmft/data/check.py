"""`mmft data check CONFIG`: everything a run would find out about its data, before the run, and all of it at once.

The token store is built as the run builds it, so the run starts from a warm cache. Then each distinct image is looked
at, and what the store holds is measured. A data file without a config is the affair of `check_file.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from mmft.config import Data, TrainConfig
from mmft.config.check import check_data
from mmft.data.check_report import CheckReport, Outcome, count_outcomes
from mmft.data.dataset import TOO_LONG, prepare
from mmft.data.headers import ImageReport, check_images, reason_kind
from mmft.data.image_paths import NOT_FOUND
from mmft.data.measure import Duplicates, duplicates, hash_records, histogram
from mmft.data.pack import PackedStore
from mmft.data.records import bound_template, is_unbound
from mmft.data.sampler import describe_steps, make_sampler
from mmft.data.shape import describe_model
from mmft.data.store import DROPPED, REPLACED, TokenStore
from mmft.data.tokenize import Tokenizer
from mmft.data.visible import one_line
from mmft.errors import DataError
from mmft.plugins import Plugins

NOTHING = "nothing to train"
LENGTHS = "tokens, pictures included, of each record before it is cut or dropped"


def bars() -> Progress:
    """Progress for a person: on stderr, and only where that is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)


def check_config_data(
    config: TrainConfig, plugins: Plugins, progress: Progress, *, decode: bool = False
) -> CheckReport:
    """Prepare the data of a config, open its images, and report.

    Raises `ConfigError` for a wrong config, and `DataError` only where nothing can be said.
    """
    check_data(config, plugins)
    data = config.data
    shape = describe_model(config.model, plugins)
    cache = config.runtime.cache_dir or config.runtime.output_dir.parent / ".cache"
    store, problems = _prepared(config, plugins, shape.tokenizer, cache, progress)
    paths = list(_image_paths(store))
    images = look_at_images(paths, progress, decode=decode)
    proof, said = prove(data, plugins, shape.tokenizer)
    if proof and not data.allow_template_difference:
        problems.append(
            f"data.chat_template: {data.chat_template!r} differs from the model's own template in {len(proof)} "
            "case(s); choose another, or set data.allow_template_difference=True"
        )
    problems += _bad_share(store, data, images)
    missing = [drop for drop in store.drops if drop.reason.startswith(NOT_FOUND)]
    bad_images = (*bad_image_outcomes(images), *(replace(o, action="bad") for o in count_outcomes(missing)))
    if bad_images:
        problems.append(
            f"{sum(o.count for o in bad_images):,} images cannot be read; see bad_images.jsonl and dropped.jsonl"
        )
    facts = [*_record_facts(store, data), *_token_facts(store, shape.tokenizer, config)]
    if paths or missing:
        facts += image_facts(images, len(paths))
    facts.append(("template", f"{data.chat_template}: {said}"))
    return CheckReport(
        subject=f"data of {config.runtime.output_dir.name}",
        facts=tuple(facts),
        outcomes=count_outcomes(store.drops),
        lengths=histogram(record_lengths(store), LENGTHS),
        images=images,
        bad_images=bad_images,
        proof=proof,
        problems=tuple(problems),
        drops=store.drops,
    )


def _prepared(
    config: TrainConfig, plugins: Plugins, tokenizer: Tokenizer, cache: Path, progress: Progress
) -> tuple[TokenStore, list[str]]:
    """The token store, and what would stop a run here; `too_long="error"` is set aside once it has been met."""
    data, seed = config.data, config.runtime.seed
    task = progress.add_task("preparing", total=None)
    try:
        store = prepare(data, plugins, tokenizer, cache, refuse=False, seed=seed)
    except DataError as error:
        if data.too_long != "error":
            raise
        lenient = data.model_copy(update={"too_long": "drop"})
        return prepare(lenient, plugins, tokenizer, cache, refuse=False, seed=seed), [str(error)]
    finally:
        progress.remove_task(task)
    bad = (drop for drop in store.drops if drop.action == DROPPED and not drop.reason.startswith(TOO_LONG))
    first = next(bad, None) if data.on_bad_sample == "error" else None
    return store, [f"{first} (data.on_bad_sample is 'error')"] if first else []


def _image_paths(store: TokenStore) -> Iterator[str]:
    for sample in range(len(store.images)):
        yield from map(str, store.images[sample])


def look_at_images(paths: list[str], progress: Progress, *, decode: bool) -> ImageReport:
    """Open each distinct image, with a bar."""
    distinct = list(dict.fromkeys(paths))
    task = progress.add_task("images" if decode else "image headers", total=len(distinct))
    return check_images(distinct, decode=decode, progress=lambda count: progress.advance(task, count))


def prove(data: Data, plugins: Plugins, tokenizer: Tokenizer) -> tuple[tuple[str, ...], str]:
    """The differences between the template and the model's own, and one sentence about them."""
    from mmft.data.proof import prove_template

    template = bound_template(data.chat_template, plugins, tokenizer)
    if is_unbound(template):
        return (), "this model has none, and documents need none"
    found = tuple(map(str, prove_template(template, tokenizer)))
    if found:
        return found, "differs from the model's own"
    if template.name == "auto":
        return found, "the model's own"
    compared = template.compare and tokenizer.hf.chat_template
    return found, "same ids as the model's own" if compared else "the model has none of its own to compare with"


def _bad_share(store: TokenStore, data: Data, images: ImageReport) -> list[str]:
    dropped = sum(drop.action in (DROPPED, REPLACED) for drop in store.drops)
    bad = images.bad
    unseen = [any(str(path) in bad for path in store.images[i]) for i in range(len(store.images))] if bad else []
    if sum(unseen) == len(store.offsets) - 1:
        return ["nothing is left to train on"]
    blind = int(np.add.reduceat(unseen, store.first_of_record).astype(bool).sum()) if bad else 0
    share = (dropped + blind) / max(1, store.num_records)
    if share <= data.max_bad_fraction:
        return []
    count = f"{dropped + blind:,} of {store.num_records:,} records ({share:.1%}) cannot be trained"
    return [f"{count}; at most {data.max_bad_fraction:.1%} is allowed (data.max_bad_fraction)"]


def _record_facts(store: TokenStore, data: Data) -> Iterator[tuple[str, str]]:
    kept, samples = len(store.first_of_record), len(store.offsets) - 1
    pieces = f" as {samples:,} samples" if samples != kept else ""
    yield "records", f"{store.num_records:,} in {len(data.datasets)} dataset(s), {kept:,} kept{pieces}"
    if len(store) != samples:
        yield "an epoch", f"{len(store):,} samples, by the datasets' repeat and weight"
    yield "not trained", share_of(sum(d.reason.startswith(NOTHING) for d in store.drops), store.num_records)
    lengths = record_lengths(store)
    long = int((lengths > data.max_length).sum())
    what = f" (data.too_long={data.too_long!r}); the longest has {int(lengths.max()):,} tokens" if long else ""
    yield f"longer than {data.max_length:,}", f"{share_of(long, store.num_records)} of the records{what}"


def record_lengths(store: TokenStore) -> NDArray[np.int64]:
    """int64[R]: the tokens of each record, pictures included, as it is before anything is cut or dropped."""
    lengths = np.diff(store.offsets) if store.record_lengths is None else store.record_lengths
    return np.asarray(lengths, np.int64)


def _token_facts(store: TokenStore, tokenizer: Tokenizer, config: TrainConfig) -> Iterator[tuple[str, str]]:
    data, total, first = config.data, int(store.offsets[-1]), store.first_of_record
    yield "tokens", f"{total:,} kept, trained {share_of(int(store.targets.sum()), total)}"
    found = duplicates(hash_records(store))

    def text(record_item: int) -> str:
        item = int(first[record_item])
        start = int(store.offsets[item])
        ids = store.ids[start : min(start + 200, int(store.offsets[item + 1]))].tolist()
        said = str(tokenizer.hf.decode([i for i in ids if i != tokenizer.image_id]))
        source, record = store.origins.of(item) if store.origins else ("", 0)
        return f"{source} record {record:,}: {said}" if record else said

    yield "duplicates", describe_duplicates(found, len(first), text)
    if not len(store):
        return
    dataset = PackedStore.of(store, data.max_length) if data.packing else store
    if isinstance(dataset, PackedStore):
        yield "packing", dataset.summary()
    yield "a step", describe_steps(make_sampler(config, dataset), config.optim.batch_size_per_device)


def describe_duplicates(found: Duplicates, number: int, text: Callable[[int], str]) -> str:
    """How many, and the beginning of the most frequent."""
    said = share_of(found.num_extra, number)
    if found.most:
        copies, item = found.most[0]
        said += f"; most often, {copies:,} times: {one_line(text(item), 120)}"
    return said


def bad_image_outcomes(images: ImageReport) -> Iterator[Outcome]:
    """The images that cannot be read, by kind of reason."""
    for kind, count in images.reasons.most_common():
        path, reason = next((p, r) for p, r in images.bad.items() if reason_kind(r) == kind)
        yield Outcome("bad", kind, count, f"{path}: {reason}")


def image_facts(images: ImageReport, uses: int) -> Iterator[tuple[str, str]]:
    """How many images there are and how large."""
    how = "decoded whole" if images.decoded else "headers read; --decode also finds files cut off"
    yield "images", f"{images.num_images:,} files in {uses:,} places, {len(images.bad):,} bad ({how})"
    if images.smallest and images.largest:
        (w, h), (wide, high) = images.smallest, images.largest
        yield "image sizes", f"from {w:,} x {h:,} to {wide:,} x {high:,} pixels"


def share_of(count: int, total: int) -> str:
    """`3 (1.5 %)`."""
    return f"{count:,} ({count / max(1, total):.1%})"

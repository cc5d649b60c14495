"""What the model will learn, shown to a person: each token run in the colour of its fate.

A `View` is one thing to look at: a record, or a packed row of several samples. It is found here and printed here;
`inspect_html.py` makes a page of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import numpy as np
from rich.text import Text as Styled

from mmft.config import Dataset, TrainConfig
from mmft.config.check import check_data
from mmft.data.dataset import prepare
from mmft.data.pack import PackedStore
from mmft.data.records import bound_template, iterate_samples, render_sample
from mmft.data.shape import describe_model
from mmft.data.tokenize import Tokenizer, tokenize
from mmft.data.visible import visible
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.types import Conversation, RawRecord, Sample, TokenizedSample

TRAINED, CONTEXT, PICTURE = "bold green", "dim", "magenta"


@dataclass(frozen=True, slots=True)
class View:
    """A record with its one sample, or why it has none; or a packed row with all of its samples."""

    title: str
    samples: tuple[TokenizedSample, ...] = ()
    error: str = ""
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """Which records: `number` of each dataset, from record `start`, those that say `search`, of dataset `only`."""

    number: int = 3
    start: int = 1  # counted from 1
    search: str | None = None
    only: int | None = None  # counted from 0, as in data.datasets.0


class Views:
    """What a config trains on, to be looked at. Loads the tokenizer, no weights."""

    def __init__(self, config: TrainConfig, plugins: Plugins) -> None:
        check_data(config, plugins)
        self._config, self._plugins = config, plugins
        self.tokenizer = describe_model(config.model, plugins).tokenizer
        self._template = bound_template(config.data.chat_template, plugins, self.tokenizer)

    def samples(self, choice: Choice) -> Iterator[View]:
        """Records, with what would be dropped and why.

        Raises `DataError` where there is no such dataset, no such record, or none that says the text.
        """
        datasets = self._config.data.datasets
        if choice.only is not None and choice.only >= len(datasets):
            raise DataError(f"--dataset {choice.only}: there are {len(datasets)}, counted from 0 (data.datasets)")
        shown = 0
        for dataset in datasets if choice.only is None else (datasets[choice.only],):
            found = (
                one
                for one in iterate_samples(dataset, self._plugins, choice.start - 1)
                if choice.search is None or choice.search.casefold() in _said(one[1], one[2]).casefold()
            )
            for number, _, sample in islice(found, choice.number):
                shown += 1
                yield self._view(dataset, number, sample)
        if not shown:
            what = f"that says {choice.search!r} from" if choice.search else "at"
            names = ", ".join(_name(dataset) for dataset in datasets)
            raise DataError(f"no record {what} record {choice.start:,} on; looked in {names}")

    def packed(self, row: int) -> Iterator[View]:
        """A packed row of the run, counted from 1. The token store is built, or taken from the cache.

        Raises `DataError` where there is no such row.
        """
        data, runtime = self._config.data, self._config.runtime
        cache = runtime.cache_dir or runtime.output_dir.parent / ".cache"
        store = prepare(data, self._plugins, self.tokenizer, cache, seed=runtime.seed)
        rows = PackedStore.of(store, data.max_length)
        if row > len(rows):
            raise DataError(f"--packed {row}: there are {len(rows):,} rows of {data.max_length:,} tokens")
        samples = rows[row - 1].samples
        tokens = sum(map(len, samples))
        title = f"row {row:,} of {len(rows):,}: {len(samples)} samples, {tokens:,} of {data.max_length:,} tokens"
        yield View(f"{title} ({tokens / data.max_length:.1%} full)", samples, packed=True)

    def _view(self, dataset: Dataset, number: int, sample: Sample | str) -> View:
        where, limit = f"{_name(dataset)} record {number}", self._config.data.max_length
        try:
            if isinstance(sample, str):
                raise DataError(sample)
            tokenized = tokenize(render_sample(sample, self._template, self.tokenizer), self.tokenizer)
        except DataError as error:
            return View(where, error=f"dropped: {error}")
        note = f", longer than max_length {limit}" if len(tokenized) > limit else ""
        return View(f"{where}: {describe_sample(tokenized)}{note}", (tokenized,))


def _name(dataset: Dataset) -> str:
    return str(dataset.source.options.get("path", dataset.source.name))


def _said(record: RawRecord, sample: Sample | str) -> str:
    """The text of a record; where no map could read it, the record as it stands."""
    if isinstance(sample, str):
        return str(record)
    if isinstance(sample, Conversation):
        return "\n".join(message.text + "".join(map(str, message.tool_calls)) for message in sample.messages)
    return sample.text


def terminal_lines(views: Iterable[View], tokenizer: Tokenizer) -> Iterator[Styled]:
    """The views for a terminal, the legend first. Nothing of the data can act on the screen."""
    for count, view in enumerate(views):
        if not count:
            yield legend()
        title = visible(view.title)
        if view.error:
            yield Styled(f"\n{title}: {visible(view.error)}", "red")
            continue
        yield Styled(f"\n{title}", "bold")
        for border, sample in zip(borders(view), view.samples, strict=True):
            if view.packed:
                yield Styled(border, "cyan")
            yield show_sample(sample, tokenizer)


def borders(view: View) -> list[str]:
    """What stands above each sample of a packed row: `── 2 of 3 · tokens 20-37 · 18 tokens, 9 trained`."""
    ends = list(accumulate(map(len, view.samples)))
    return [
        f"── {k} of {len(ends)} · tokens {end - len(sample)}-{end - 1} · {describe_sample(sample)} ──"
        for k, (end, sample) in enumerate(zip(ends, view.samples, strict=True), 1)
    ]


def show_samples(config: TrainConfig, plugins: Plugins, number: int) -> Iterator[Styled]:
    """The first `number` samples of each dataset, with what would be dropped and why."""
    views = Views(config, plugins)
    return terminal_lines(views.samples(Choice(number)), views.tokenizer)


def legend() -> Styled:
    """What the colours mean."""
    return Styled.assemble(("trained", TRAINED), "  ", ("context", CONTEXT), "  ", ("picture", PICTURE))


def show_sample(sample: TokenizedSample, tokenizer: Tokenizer) -> Styled:
    """The sample's text: trained runs in green between ⟦ ⟧ (readable without colour), context dim, images by name."""
    shown = Styled()
    images = iter(sample.images)
    for start, stop, kind in runs(sample, tokenizer):
        if kind == "image":
            for _ in range((stop - start) // tokenizer.tokens_per_image):
                name = visible(str(next(images).source))
                shown.append(f"[{name}: {tokenizer.tokens_per_image} tokens]", PICTURE)
            continue
        text = visible(tokenizer.hf.decode(sample.input_ids[start:stop].tolist(), skip_special_tokens=False))
        shown.append(f"⟦{text}⟧" if kind == "trained" else text, TRAINED if kind == "trained" else CONTEXT)
    return shown


def describe_sample(sample: TokenizedSample) -> str:
    """`74 tokens, 12 trained, 1 image`."""
    trained = int(sample.loss_mask[1:].sum())
    images = f", {len(sample.images)} image{'s' if len(sample.images) != 1 else ''}" if sample.images else ""
    return f"{len(sample)} tokens, {trained} trained{images}"


def runs(sample: TokenizedSample, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """(start, stop, kind) of neighbouring tokens with the same fate; kind is `context`, `trained` or `image`."""
    kinds = np.where(sample.loss_mask, 1, 0)
    if tokenizer.image_id is not None:
        kinds = np.where(sample.input_ids == tokenizer.image_id, 2, kinds)
    edges = np.flatnonzero(np.diff(kinds)) + 1
    bounds: Sequence[int] = [0, *edges.tolist(), len(kinds)]
    for start, stop in pairwise(bounds):
        if stop > start:
            yield start, stop, ("context", "trained", "image")[kinds[start]]

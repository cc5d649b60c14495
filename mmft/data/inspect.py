"""What the model will learn, shown to a person: each token run in the colour of its fate."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
from rich.text import Text as Styled

from mmft.config import TrainConfig
from mmft.data.records import iterate_samples, render_sample
from mmft.data.shape import describe_model
from mmft.data.tokenize import Tokenizer, tokenize
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.types import TokenizedSample

TRAINED, CONTEXT, PICTURE = "bold green", "dim", "magenta"


def legend() -> Styled:
    """What the colours mean."""
    return Styled.assemble(("trained", TRAINED), "  ", ("context", CONTEXT), "  ", ("picture", PICTURE))


def show_sample(sample: TokenizedSample, tokenizer: Tokenizer) -> Styled:
    """The sample's text: trained runs in green between ⟦ ⟧ (readable without colour), context dim, images by name."""
    shown = Styled()
    images = iter(sample.images)
    for start, stop, kind in _runs(sample, tokenizer):
        if kind == "image":
            for _ in range((stop - start) // tokenizer.tokens_per_image):
                shown.append(f"[{next(images).source}: {tokenizer.tokens_per_image} tokens]", PICTURE)
            continue
        text = tokenizer.hf.decode(sample.input_ids[start:stop].tolist(), skip_special_tokens=False)
        shown.append(f"⟦{text}⟧" if kind == "trained" else text, TRAINED if kind == "trained" else CONTEXT)
    return shown


def describe_sample(sample: TokenizedSample) -> str:
    """`74 tokens, 12 trained, 1 image`."""
    trained = int(sample.loss_mask[1:].sum())
    images = f", {len(sample.images)} image{'s' if len(sample.images) != 1 else ''}" if sample.images else ""
    return f"{len(sample)} tokens, {trained} trained{images}"


def _runs(sample: TokenizedSample, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    kinds = np.where(sample.loss_mask, 1, 0)
    if tokenizer.image_id is not None:
        kinds = np.where(sample.input_ids == tokenizer.image_id, 2, kinds)
    edges = np.flatnonzero(np.diff(kinds)) + 1
    bounds: Sequence[int] = [0, *edges.tolist(), len(kinds)]
    for start, stop in pairwise(bounds):
        if stop > start:
            yield start, stop, ("context", "trained", "image")[kinds[start]]


def show_samples(config: TrainConfig, plugins: Plugins, number: int) -> Iterator[Styled]:
    """The first `number` samples of each dataset, with what would be dropped and why."""
    shape = describe_model(config.model, plugins)
    template = plugins.chat_templates.get(config.data.chat_template).for_tokenizer(shape.tokenizer.hf)
    yield legend()
    for dataset in config.data.datasets:
        for record, _, sample in islice(iterate_samples(dataset, plugins), number):
            where = f"\n{dataset.source.options.get('path', dataset.source.name)} record {record}"
            try:
                if isinstance(sample, str):
                    raise DataError(sample)
                tokenized = tokenize(render_sample(sample, template, shape.tokenizer), shape.tokenizer)
            except DataError as error:
                yield Styled(f"{where}: dropped: {error}", "red")
                continue
            note = (
                f", longer than max_length {config.data.max_length}" if len(tokenized) > config.data.max_length else ""
            )
            yield Styled(f"{where}: {describe_sample(tokenized)}{note}", "bold")
            yield show_sample(tokenized, shape.tokenizer)

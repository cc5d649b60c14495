"""The page of `mmft data show --html`: each token a span with its id, each picture a thumbnail; one file."""

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from mmft.data.inspect import View, borders, runs
from mmft.data.tokenize import Tokenizer
from mmft.data.visible import visible
from mmft.errors import DataError
from mmft.images import open_image
from mmft.types import TokenizedSample

THUMBNAIL = 128  # pixels of the longer side
MAX_TOKENS = 20_000  # shown of one sample; a page with a million spans opens in no browser
HELD = 8  # tokens that may share one character: UTF-8 needs 4, and a broken character must not hold the rest


@dataclass(frozen=True, slots=True)
class Span:
    """What is drawn as one: usually a token. `image` is a data URL; `ids` is what the pointer reads."""

    kind: str
    text: str
    ids: str
    image: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """One sample of a view."""

    border: str
    spans: tuple[Span, ...] = field(default_factory=tuple)
    left_out: int = 0


def write_page(path: Path, title: str, views: Iterable[View], tokenizer: Tokenizer) -> None:
    """Write the page; its folder is made."""
    page = html_page(title, views, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")


def html_page(title: str, views: Iterable[View], tokenizer: Tokenizer) -> str:
    """The views as one HTML file. Whatever comes from the data is escaped by the template."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, finalize=lambda v: visible(v) if isinstance(v, str) else v)
    template = environment.from_string(files("mmft.data").joinpath("show.html.jinja").read_text("utf-8"))
    return template.render(title=title, views=[(view, _blocks(view, tokenizer)) for view in views])


def _blocks(view: View, tokenizer: Tokenizer) -> list[Block]:
    return [
        Block(border if view.packed else "", tuple(spans(sample, tokenizer)), max(0, len(sample) - MAX_TOKENS))
        for border, sample in zip(borders(view), view.samples, strict=True)
    ]


def spans(sample: TokenizedSample, tokenizer: Tokenizer) -> Iterator[Span]:
    """The sample in reading order. Tokens that are parts of one character share a span."""
    images = iter(sample.images)
    for start, stop, kind in runs(sample, tokenizer):
        if start >= MAX_TOKENS:
            return
        if kind != "image":
            yield from _text_spans(sample, start, min(stop, MAX_TOKENS), kind, tokenizer)
            continue
        for _ in range((stop - start) // tokenizer.tokens_per_image):
            source = str(next(images).source)
            url, note = thumbnail(source)
            yield Span(
                kind, f"{source}: {note or f'{tokenizer.tokens_per_image} tokens'}", str(tokenizer.image_id), url
            )


def _text_spans(sample: TokenizedSample, start: int, stop: int, kind: str, tokenizer: Tokenizer) -> Iterator[Span]:
    """Each token's own text is what it adds to the text before it: alone, many tokenizers drop its leading space."""
    ids = sample.input_ids[:stop].tolist()
    # what the first token is decoded after; never an image token, whose id may have no text at all
    before = start - 1 if start and ids[start - 1] != tokenizer.image_id else start
    first = start
    for at in range(start, stop):
        text = _added(tokenizer, ids[before:first], ids[before : at + 1])
        if text.endswith("\ufffd") and at + 1 < stop and at + 1 - first < HELD:
            continue
        yield Span(kind, text, " ".join(map(str, ids[first : at + 1])))
        before, first = first, at + 1


def _added(tokenizer: Tokenizer, before: list[int], whole: list[int]) -> str:
    head = str(tokenizer.hf.decode(before, skip_special_tokens=False)) if before else ""
    text = str(tokenizer.hf.decode(whole, skip_special_tokens=False))
    return text[len(head) :] if text.startswith(head) else str(tokenizer.hf.decode(whole[len(before) :]))


def thumbnail(source: str) -> tuple[str, str]:
    """(data URL, "") of a picture made small, or ("", why it cannot be shown)."""
    try:
        picture = open_image(source)
    except DataError as error:
        return "", str(error).removeprefix(f"{source}: ")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", ""

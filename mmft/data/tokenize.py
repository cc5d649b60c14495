"""Segments to token ids: the one function through which training and chat both go.

A token boundary is forced only where the loss changes (the end of a prompt, where inference has one too), at an image,
and around data that spells a control token. Everything else is joined before it is encoded, so ordinary text gets the
ids that encoding the whole string would give.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from mmft.errors import DataError
from mmft.types import Document, Image, Segment, TokenizedSample

IMAGE_TOKEN = "<image>"
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Tokenizer:
    """A transformers tokenizer with what mmft needs beside it.

    `image_id` is the id that stands for an image feature; `tokens_per_image` is 0 for a text-only model. The wrapped
    tokenizer must be a fast one (`tokenizers`), as all of transformers 5's are.
    """

    hf: Any
    tokens_per_image: int = 0
    image_id: int | None = None
    writes_bos: bool = field(init=False, repr=False, compare=False)  # the tokenizer puts BOS before a text by itself
    _special: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _firsts: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _beginnings: frozenset[str] = field(init=False, repr=False, compare=False)
    _edge: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # asked once, here: transformers' call sets flags of the Rust tokenizer, and later the encoding thread sets them
        object.__setattr__(self, "writes_bos", bool(self.hf.bos_token and self.hf("")["input_ids"]))
        added = self.hf.added_tokens_decoder.values()
        spellings = sorted({str(token) for token in added if token.special}, key=len, reverse=True)
        pattern = "|".join(map(re.escape, spellings)) or r"(?!)"
        object.__setattr__(self, "_special", re.compile(pattern))
        object.__setattr__(self, "_firsts", tuple(sorted({spelling[0] for spelling in spellings})))
        beginnings = frozenset(spelling[:end] for spelling in spellings for end in range(1, len(spelling)))
        object.__setattr__(self, "_beginnings", beginnings)
        object.__setattr__(self, "_edge", max(1, max(map(len, spellings), default=1) - 1))

    @classmethod
    def for_model(cls, hf: Any, tokens_per_image: int = 0) -> "Tokenizer":
        """Add the image token where the model has images; its id may lie beyond the embedding matrix."""
        if tokens_per_image == 0:
            return cls(hf)
        if not any(str(token) == IMAGE_TOKEN and token.special for token in hf.added_tokens_decoder.values()):
            hf.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
        return cls(hf, tokens_per_image, hf.convert_tokens_to_ids(IMAGE_TOKEN))

    @property
    def eos_id(self) -> int | None:
        """The end-of-sequence id, if the tokenizer has one."""
        eos: int | None = self.hf.eos_token_id
        return eos

    def has_control_token(self, text: str) -> bool:
        """Whether text spells a control token of this tokenizer."""
        return self._may_spell(text) and self._special.search(text) is not None

    def spells_across(self, left: str, right: str) -> bool:
        """Whether a control token begins in one text and ends in the other: joined, data would forge it."""
        before = left[-self._edge :]
        if not any(self._begins_in(before, first) for first in self._firsts):
            return False
        joined, at = before + right[: self._edge], len(before)
        return any(found.start() < at < found.end() for found in self._special.finditer(joined))

    def _begins_in(self, text: str, first: str) -> bool:
        """Whether text ends in the beginning of a control token whose first character is `first`."""
        at = text.find(first)
        while at >= 0:
            if text[at:] in self._beginnings:
                return True
            at = text.find(first, at + 1)
        return False

    def _may_spell(self, text: str) -> bool:
        """Whether text holds a first character of a control token: a search a hundred times cheaper than a pattern."""
        for first in self._firsts:  # noqa: SIM110 - a generator costs more than the search
            if first in text:
                return True
        return False

    def encode(self, texts: Sequence[str], *, as_data: bool = False) -> list[Ids]:
        """Ids of each text, without BOS or EOS; `as_data` keeps the spelling of control tokens as plain text."""
        ids, lengths = self.encode_flat(texts, as_data=as_data)
        return np.split(ids, np.cumsum(lengths)[:-1]) if texts else []

    def encode_flat(self, texts: Sequence[str], *, as_data: bool = False) -> tuple[Ids, NDArray[np.int64]]:
        """As `encode`, in one array of all ids, with the number of ids of each text.

        Goes to the Rust tokenizer directly: transformers' call around it costs as much Python as a short text costs
        Rust. Padding and truncation, which a tokenizer file may ask for, are switched off, as transformers does.
        """
        if not texts:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        core = self.hf.backend_tokenizer
        if core.truncation is not None:
            core.no_truncation()
        if core.padding is not None:
            core.no_padding()
        if core.encode_special_tokens is not as_data:
            core.encode_special_tokens = as_data
        try:
            encoded = [one.ids for one in core.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            if as_data:
                core.encode_special_tokens = False
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum())), lengths


# What is encoded in one go: a text or an image, whether it is trained, whether control tokens in it stay text.
Piece: TypeAlias = tuple[str | Image, bool, bool]


@dataclass(frozen=True, slots=True)
class TokenizedChunk:
    """Samples one after another: int32[T] ids, bool[T] loss, int64[S + 1] offsets, and the images of each."""

    ids: Ids
    loss: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    images: list[tuple[Image, ...]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: int) -> TokenizedSample:
        start, stop = self.offsets[sample], self.offsets[sample + 1]
        return TokenizedSample(self.ids[start:stop], self.loss[start:stop], self.images[sample])


def tokenize(segments: Sequence[Segment], tokenizer: Tokenizer) -> TokenizedSample:
    """The token ids and the loss mask of one rendered sample."""
    return tokenize_batch([segments], tokenizer)[0]


def tokenize_batch(rendered: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> list[TokenizedSample]:
    """Many rendered samples with two calls into the tokenizer.

    Raises `DataError` where a sample holds an image and the model takes none, or text that is not Unicode.
    """
    chunk = encode_pieces([pieces_of(segments, tokenizer) for segments in rendered], tokenizer)
    return [chunk[sample] for sample in range(len(chunk))]


def encode_pieces(samples: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> TokenizedChunk:
    """The tokens of many samples, with no work in Python for each token. May run in a thread of its own."""
    pieces = list(chain.from_iterable(samples))
    plain = [content for content, _, as_data in pieces if not as_data and content.__class__ is str]
    loss = np.fromiter([trained for _, trained, _ in pieces], np.bool_, len(pieces))
    images: list[tuple[Image, ...]] = [()] * len(samples)
    ids, lengths = tokenizer.encode_flat(plain)
    if len(plain) < len(pieces):
        data = [content for content, _, as_data in pieces if as_data]
        kinds = np.array([2 if isinstance(c, Image) else int(as_data) for c, _, as_data in pieces], np.int8)
        data_ids, data_lengths = tokenizer.encode_flat(cast(list[str], data), as_data=True)
        plain_ids, plain_lengths = ids, lengths
        lengths = np.full(len(pieces), tokenizer.tokens_per_image, np.int64)
        lengths[kinds == 0], lengths[kinds == 1] = plain_lengths, data_lengths
        of_token = np.repeat(kinds, lengths)
        ids = np.full(len(of_token), -1 if tokenizer.image_id is None else tokenizer.image_id, np.int32)
        ids[of_token == 0], ids[of_token == 1] = plain_ids, data_ids
        images = [tuple(c for c, _, _ in sample if isinstance(c, Image)) for sample in samples]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    last = np.concatenate([[0], np.cumsum(np.fromiter(map(len, samples), np.int64, len(samples)))])
    return TokenizedChunk(ids, np.repeat(loss, lengths), ends[last], images)


def pieces_of(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[Piece]:
    """Join neighbours of equal loss; keep apart images and data that spells a control token.

    Raises `DataError` where the model takes no image, or text is not Unicode.
    """
    pieces: list[Piece] = []
    texts: list[str] = []  # of the piece that may still grow
    tail, loss = "", False
    for segment in segments:
        content = segment.content
        if not isinstance(content, str):
            if tokenizer.image_id is None:
                raise DataError("the sample has an image, but the model has no vision encoder; set model.vision")
            _close(pieces, texts, loss)
            pieces.append((content, False, False))
            continue
        if not content:
            continue
        if not content.isascii():
            refuse_surrogates(content)
        as_data = not segment.markup and tokenizer.has_control_token(content)
        if texts and not as_data and segment.loss == loss and not tokenizer.spells_across(tail, content):
            texts.append(content)
            tail = content if len(content) >= tokenizer._edge else tail + content
            continue
        _close(pieces, texts, loss)
        if as_data:
            pieces.append((content, segment.loss, True))
        else:
            texts.append(content)
            tail, loss = content, segment.loss
    _close(pieces, texts, loss)
    return pieces


def _close(pieces: list[Piece], texts: list[str], loss: bool) -> None:
    """End the piece under way."""
    if texts:
        pieces.append((texts[0] if len(texts) == 1 else "".join(texts), loss, False))
        texts.clear()


def refuse_surrogates(text: str) -> None:
    """Raise `DataError` for half a character (JSON's `\\ud83d` without its other half): no tokenizer can encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, around = ord(text[error.start]), text[max(0, error.start - 20) : error.start + 21]
        raise DataError(
            f"lone surrogate U+{code:04X} at character {error.start + 1:,}: {around!a}; "
            "the text was cut inside a character, or was not UTF-8"
        ) from error


def document_segments(document: Document, tokenizer: Tokenizer) -> list[Segment]:
    """A document for incremental pretraining: every token a target, BOS before it and EOS after it where they exist."""
    bos, eos = tokenizer.hf.bos_token, tokenizer.hf.eos_token
    markup = [Segment(bos, loss=True, markup=True)] if tokenizer.writes_bos else []
    return [*markup, Segment(document.text, loss=True), *([Segment(eos, loss=True, markup=True)] if eos else [])]

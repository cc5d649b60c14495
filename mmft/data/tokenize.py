"""Segments to token ids: the one function through which training and chat both go.

A token boundary is forced only where the loss changes (the end of a prompt, where inference has one too), at an image,
and around data that spells a control token. Everything else is joined before it is encoded, so ordinary text gets the
ids that encoding the whole string would give.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    _special: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _longest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        added = self.hf.added_tokens_decoder.values()
        spellings = sorted({str(token) for token in added if token.special}, key=len, reverse=True)
        pattern = "|".join(map(re.escape, spellings)) or r"(?!)"
        object.__setattr__(self, "_special", re.compile(pattern))
        object.__setattr__(self, "_longest", max(map(len, spellings), default=1))

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
        return self._special.search(text) is not None

    def spells_across(self, left: str, right: str) -> bool:
        """Whether a control token begins in one text and ends in the other: joined, data would forge it."""
        edge = self._longest - 1
        joined, at = left[-edge:] + right[:edge], len(left[-edge:])
        return any(found.start() < at < found.end() for found in self._special.finditer(joined))

    def encode(self, texts: Sequence[str], *, as_data: bool = False) -> list[Ids]:
        """Ids of each text, without BOS or EOS; `as_data` keeps the spelling of control tokens as plain text."""
        if not texts:
            return []
        encoded = self.hf(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=as_data,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is encoded in one go: a text, or an image."""

    content: str | Image
    loss: bool
    as_data: bool = False


def tokenize(segments: Sequence[Segment], tokenizer: Tokenizer) -> TokenizedSample:
    """The token ids and the loss mask of one rendered sample."""
    return tokenize_batch([segments], tokenizer)[0]


def tokenize_batch(rendered: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> list[TokenizedSample]:
    """Many rendered samples with two calls into the tokenizer.

    Raises `DataError` where a sample holds an image and the model takes none.
    """
    samples = [_pieces(segments, tokenizer) for segments in rendered]
    encoded: dict[bool, list[Ids]] = {}
    for as_data in (False, True):
        texts = [p.content for pieces in samples for p in pieces if isinstance(p.content, str) and p.as_data is as_data]
        encoded[as_data] = tokenizer.encode(texts, as_data=as_data)
    queues = {as_data: iter(ids) for as_data, ids in encoded.items()}
    return [_assemble(pieces, queues, tokenizer) for pieces in samples]


def _assemble(pieces: list[_Piece], queues: dict[bool, Any], tokenizer: Tokenizer) -> TokenizedSample:
    blocks: list[Ids] = []
    masks: list[NDArray[np.bool_]] = []
    images: list[Image] = []
    for piece in pieces:
        if isinstance(piece.content, Image):
            assert tokenizer.image_id is not None
            images.append(piece.content)
            ids = np.full(tokenizer.tokens_per_image, tokenizer.image_id, dtype=np.int32)
        else:
            ids = next(queues[piece.as_data])
        blocks.append(ids)
        masks.append(np.full(len(ids), piece.loss, dtype=np.bool_))
    if not blocks:
        return TokenizedSample(np.empty(0, np.int32), np.empty(0, np.bool_))
    return TokenizedSample(np.concatenate(blocks), np.concatenate(masks), tuple(images))


def _pieces(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[_Piece]:
    """Join neighbours of equal loss; keep apart images and data that spells a control token."""
    pieces: list[_Piece] = []
    for segment in segments:
        content = segment.content
        if isinstance(content, Image):
            if tokenizer.image_id is None:
                raise DataError("the sample has an image, but the model has no vision encoder; set model.vision")
            pieces.append(_Piece(content, loss=False))
            continue
        if not content:
            continue
        as_data = not segment.markup and tokenizer.has_control_token(content)
        last = pieces[-1] if pieces else None
        before = last.content if last and not last.as_data and last.loss == segment.loss else None
        if isinstance(before, str) and not as_data and not tokenizer.spells_across(before, content):
            pieces[-1] = _Piece(before + content, segment.loss)
        else:
            pieces.append(_Piece(content, segment.loss, as_data))
    return pieces


def document_segments(document: Document, tokenizer: Tokenizer) -> list[Segment]:
    """A document for incremental pretraining: every token a target, BOS before it and EOS after it where they exist."""
    bos, eos = tokenizer.hf.bos_token, tokenizer.hf.eos_token
    markup = [Segment(bos, loss=True, markup=True)] if bos and tokenizer.hf("")["input_ids"] else []
    return [*markup, Segment(document.text, loss=True), *([Segment(eos, loss=True, markup=True)] if eos else [])]

"""Samples longer than `max_length`: cut short, or cut in pieces; an image is never cut through."""

import numpy as np
from numpy.typing import NDArray

from mmft.data.tokenize import Tokenizer
from mmft.errors import DataError
from mmft.types import TokenizedSample


def truncate(sample: TokenizedSample, max_length: int, tokenizer: Tokenizer) -> TokenizedSample:
    """The first `max_length` tokens; an image that would be cut is left out whole, with what follows it."""
    starts = _image_starts(sample, tokenizer)
    cut = _before_image(max_length, starts, tokenizer.tokens_per_image)
    return TokenizedSample(sample.input_ids[:cut], sample.loss_mask[:cut], sample.images[: int((starts < cut).sum())])


def split(sample: TokenizedSample, max_length: int, tokenizer: Tokenizer) -> list[TokenizedSample]:
    """Pieces of at most `max_length` tokens in which every token but the sample's first is a target as it was, once.

    A piece begins with the last token of the one before (its label ignored), or with the whole image it ended in; a
    piece that begins with an image needs no such context, since an image is no target. Raises `DataError` where an
    image does not fit into a piece.
    """
    starts, per_image = _image_starts(sample, tokenizer), tokenizer.tokens_per_image
    if len(starts) and per_image > max_length:
        raise DataError(f"an image takes {per_image} tokens, more than data.max_length {max_length}")
    pieces = []
    done = 0  # tokens that are in a piece, context aside
    while done < len(sample):
        begin = done - _context(done, starts, per_image)
        end = _before_image(min(len(sample), begin + max_length), starts, per_image)
        if end <= done:  # the context leaves no room
            begin, end = done, _before_image(min(len(sample), done + max_length), starts, per_image)
        loss = sample.loss_mask[begin:end].copy()
        loss[: done - begin] = False
        inside = np.flatnonzero((starts >= begin) & (starts < end))
        images = tuple(sample.images[i] for i in inside.tolist())
        pieces.append(TokenizedSample(sample.input_ids[begin:end], loss, images))
        done = end
    return pieces


def _context(done: int, starts: NDArray[np.int64], per_image: int) -> int:
    """How many tokens before `done` a piece that goes on there repeats."""
    if done == 0 or (len(starts) and (starts == done).any()):
        return 0
    return per_image if len(starts) and (starts + per_image == done).any() else 1


def _image_starts(sample: TokenizedSample, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """int64[images]: where each image begins."""
    if not sample.images:
        return np.empty(0, np.int64)
    positions: NDArray[np.int64] = np.flatnonzero(sample.input_ids == tokenizer.image_id)[:: tokenizer.tokens_per_image]
    return positions


def _before_image(cut: int, starts: NDArray[np.int64], per_image: int) -> int:
    """The cut itself, or the beginning of the image it would go through."""
    through = starts[(starts < cut) & (starts + per_image > cut)]
    return int(through[0]) if len(through) else cut

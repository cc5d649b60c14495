"""What a model has computed and need not compute again: keys and values of a conversation, features of its pictures.

The next prompt of a conversation begins with the last one and its answer. What both share is not run again: the cache
is cropped to the common beginning of the ids, and only the rest goes through the language model. That also holds where
a turn is dropped or another conversation takes over, so a memory may outlive a session; it never holds more than one
prompt with its answer.
"""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmft.errors import DataError
from mmft.generation import Finish
from mmft.images import open_image
from mmft.modeling.llava import LlavaModel
from mmft.specs import VisionInfo
from mmft.types import TokenizedSample


@dataclass(frozen=True)
class Usage:
    """Tokens of the last answer: of the prompt, how many of those were not run again, of the answer; why it ended."""

    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    finish: Finish


@dataclass(frozen=True)
class Picture:
    """The encoder's features float[P, Dv] of a picture, and the state of its file (time and size) when it was read."""

    number: int
    state: tuple[int, int] | None
    features: Tensor


@dataclass(frozen=True)
class Recall:
    """What a prompt needs: its ids, the features float[N, P, Dv] of the pictures still to be run, and a cache.

    `places` are the ids with those of picture n as -n; `cache` holds the first `reused` of them.
    """

    places: NDArray[np.int64]
    features: Tensor | None
    cache: Any
    reused: int


class Memory:
    """Keys, values and picture features of the last prompt and its answer, for one model.

    While an answer is made the memory is empty, so an error leaves no half-written state.
    """

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._cache: Any = None
        self._places: NDArray[np.int64] = np.empty(0, np.int64)
        self._pictures: dict[str, Picture] = {}  # by path, of the last prompt
        self._numbers = count(1)

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return int(self._cache.get_seq_length()) if self._cache is not None else 0

    def forget(self) -> None:
        """Drop everything."""
        self._cache, self._places, self._pictures = None, np.empty(0, np.int64), {}

    def begin(self, model: LlavaModel, vision: VisionInfo | None, prompt: TokenizedSample) -> Recall:
        """Find out what of a prompt is new, and encode its new pictures.

        Raises `DataError` for a picture that cannot be read, or where the model takes none.
        """
        pictures = [self._picture(model, vision, str(image.source)) for image in prompt.images]
        self._pictures = {str(i.source): picture for i, picture in zip(prompt.images, pictures, strict=True)}
        places = prompt.input_ids.astype(np.int64)
        if pictures:
            numbers = np.array([-picture.number for picture in pictures], np.int64)
            at = places == model.image_id
            places[at] = np.repeat(numbers, int(at.sum()) // len(pictures))
        cache, reused = self._recall(places)
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.causal_lm.config)
        per_picture = int((places < 0).sum()) // max(len(pictures), 1)
        first = int((places[:reused] < 0).sum()) // max(per_picture, 1)
        new = [picture.features for picture in pictures[first:]]
        return Recall(places, torch.stack(new) if new else None, cache, reused)

    def keep(self, recall: Recall, answer: list[int]) -> None:
        """Remember what was run: the prompt and all of its answer but the last token."""
        self._cache = recall.cache
        self._places = np.concatenate([recall.places, np.array(answer, np.int64)])[: self.tokens]

    def _recall(self, places: NDArray[np.int64]) -> tuple[Any, int]:
        """The cache, cropped to what it shares with a prompt, and how much that is; the last token is always run."""
        cache, self._cache = self._cache, None
        if cache is None:
            return None, 0
        length = min(len(self._places), len(places) - 1)
        differs = np.flatnonzero(self._places[:length] != places[:length])
        common = int(differs[0]) if len(differs) else length
        while common and places[common] < 0 and places[common - 1] == places[common]:
            common -= 1  # a picture is run whole
        surplus = cache.get_seq_length() - common
        try:
            if surplus:
                cache.crop(-surplus)
        except (RuntimeError, ValueError):  # sliding windows and recurrent states cannot go back: all is run again
            return None, 0
        return (cache, common) if common else (None, 0)

    def _picture(self, model: LlavaModel, vision: VisionInfo | None, path: str) -> Picture:
        """A picture's features: known, where its file is as it was or gone since; else read and encoded."""
        if vision is None:
            raise DataError("the model has no vision encoder and takes no pictures")
        known, state = self._pictures.get(path), _state(path)
        if known and state in (known.state, None):
            return known
        pixels = vision.transform(open_image(path))
        picture = Picture(next(self._numbers), state, model.picture_features(pixels[None])[0])
        self._pictures[path] = picture
        return picture


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size

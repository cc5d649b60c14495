"""The life of one sample, from a raw record to a batch, in that order.

Each stage is a type, and one function leads from each to the next:

    RawRecord --DataMap.fn--> Sample --ChatTemplate.render--> Segments --tokenize--> TokenizedSample
              --pack--> PackedSample --collate--> Batch --> model

`docs/life-of-a-sample.md` follows one record through all of them. Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

IGNORE_INDEX = -100  # the label of a token that is not trained, as in torch.nn.functional.cross_entropy

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

# 1. One row as its source gave it. Never modified.
RawRecord: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Yielded by a source in the place of a record it cannot read, while it can read on: the record is dropped.

    `reason` says where in the file, what was found and what is allowed; it is counted and listed as any other drop.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text inside a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture inside a message. Not opened before a worker collates it."""

    source: str | Path


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant makes: the tool's name, its arguments as an object, and what its result refers to it by."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: meaning without format. Images keep their place between the pieces of text.

    `loss=None` means what the role implies: an assistant turn is trained, every other is not. `call_id` is the id of
    the call that a tool's output answers. `reasoning` is what an assistant thought before its answer; a chat template
    without a form for it leaves it out.
    """

    role: Role
    parts: tuple[Text | Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    loss: bool | None = None
    call_id: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """All text of the message, without its images."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of the message, in reading order."""
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def is_trained(self) -> bool:
        """Whether the model learns to write this message."""
        return self.role == "assistant" if self.loss is None else self.loss


@dataclass(frozen=True, slots=True)
class Conversation:
    """2a. Messages in order, and the JSON schemas of the tools the assistant may call.

    `notes` say what a data map left out or mended; each is counted and listed as a repair of its record.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of all messages, in reading order."""
        return tuple(image for message in self.messages for image in message.images)


@dataclass(frozen=True, slots=True)
class Document:
    """2b. Text of which every token is a target: incremental pretraining."""

    text: str


Sample: TypeAlias = Conversation | Document


@dataclass(frozen=True, slots=True)
class Segment:
    """3. A piece of the rendered sample: its format and whether it is trained, decided together.

    `markup=True` is text the template wrote, which may contain control tokens; `markup=False` is data, in which the
    spelling of a control token stays text.
    """

    content: str | Image
    loss: bool = False
    markup: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """4. Numbers: int32[T] token ids and bool[T], True where the token is a target.

    An image is `tokens_per_image` copies of the image id. Labels are not shifted: transformers' models shift.
    """

    input_ids: "NDArray[np.int32]"
    loss_mask: "NDArray[np.bool_]"
    images: tuple[Image, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class PackedSample:
    """5. Whole samples that share one row; the sum of their lengths is at most `max_length`."""

    samples: tuple[TokenizedSample, ...]


class Batch(TypedDict):
    """6. Tensors. `flat` layout: B = 1, samples follow one another, `position_ids` restart at 0 with each of them.

    `padded` layout: one sample a row, padded right, `attention_mask` marks the real tokens.
    """

    input_ids: "Tensor"  # int64[B, T]
    labels: "Tensor"  # int64[B, T], IGNORE_INDEX where nothing is learnt and at the first token of each sample
    position_ids: NotRequired["Tensor"]  # int64[B, T], flat layout
    attention_mask: NotRequired["Tensor"]  # int64[B, T], padded layout
    pixel_values: NotRequired["Tensor"]  # float32[N, 3, H, W], N images of the batch in reading order
    image_features: NotRequired["Tensor"]  # [N, P, Dv], instead of pixel_values where features are cached

"""What a plugin can offer: frozen descriptions with a name. Nothing here imports torch.

A spec is data plus plain module-level functions, so it can be listed, compared and pickled. What is expensive
(weights, torch) is loaded by its `build` function and nowhere else. Names are `[a-z0-9_]+`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mmft.types import BadRecord, Conversation, RawRecord, Sample, Segment, ToolCall

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from torch import Tensor, nn

NAME_PATTERN = re.compile(r"[a-z0-9_]+")


@runtime_checkable
class RenderFn(Protocol):
    """Turn a conversation into segments; with `generation_prompt` end where the assistant's next answer begins.

    The prompt of an answer must be a prefix of the training sequence, so no prompt ends in a space: the space
    belongs to the answer. BOS, where the model wants one, is written here, once.
    """

    def __call__(self, conversation: Conversation, /, *, generation_prompt: bool = False) -> Sequence[Segment]:
        """The segments, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DataMap:
    """A data format: `fn` reads one raw record; None means "nothing to train here" and is counted as dropped.

    `columns` are what a record of this format has and others have not, `[]` for "each item of": `messages[].role`. They
    tell a person what to bring, and mmft which format a file is in. `examples` are raw records that `fn` must accept.
    `write` is the way back, for `mmft data convert`. `fn` raises `DataError` for a record it cannot read, `write` for a
    sample the format has no place for. Added in 0.1.
    """

    name: str
    fn: Callable[[RawRecord], Sample | None]
    summary: str = ""
    columns: tuple[str, ...] = ()
    examples: Sequence[RawRecord] = ()
    write: Callable[[Sample], RawRecord] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A chat format. `stop` are the strings that end an answer; `source` says where the format is defined.

    `bind`, for a template that depends on the model's tokenizer, returns the template for that tokenizer.
    `compare=False` exempts a format that is no chat, such as LLaVA's `plain`, from being held against the model's own
    chat template: it is used on chat models although it differs. `rewrites_history=True` says that the model's own
    format writes earlier turns otherwise once the talk goes on, so that only the last answer may be trained.

    `read_calls`, of a template with tools, is the way back in chat: from an answer with its control tokens, less what
    ends it, to what is said before the calls (in a form that `render` takes beside them) and the calls, of which there
    may be none. A call without a name asks for nothing: the format wants an empty result before the answer. Where a
    call may begin is in `call_marks`: from such a text on nothing is shown before the answer is whole. Added in 0.1.
    """

    name: str
    render: RenderFn
    stop: tuple[str, ...] = ()
    supports_tools: bool = False
    source: str = ""
    bind: Callable[[Any], "ChatTemplate"] | None = None
    compare: bool = True
    rewrites_history: bool = False
    read_calls: Callable[[str], tuple[str, tuple[ToolCall, ...]]] | None = None
    call_marks: tuple[str, ...] = ()

    def for_tokenizer(self, tokenizer: Any) -> "ChatTemplate":
        """The template to use with this tokenizer; most do not depend on it."""
        return self.bind(tokenizer) if self.bind else self


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInfo:
    """What is known of an encoder without its weights.

    `transform` turns an RGB image into float32[3, H, W]; it runs in DataLoader workers, so it must pickle.
    """

    hidden_size: int
    num_patches: int
    transform: Callable[["PILImage.Image"], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionEncoderSpec:
    """A vision encoder. `describe(**options)` reads configuration only; `build(**options)` loads the weights.

    The module maps float[N, 3, H, W] to float[N, num_patches, hidden_size]. Both functions take the same options.

    `hub_option` is the option, if any, that takes a folder saved by save_pretrained or a name on a hub: mmft checks the
    folder, and looks the name up, on ModelScope too. All other options are the plugin's own business. Added in 0.1.
    """

    name: str
    describe: Callable[..., VisionInfo]
    build: Callable[..., "nn.Module"]
    summary: str = ""
    hub_option: str | None = None


def same_number(num_patches: int, **options: Any) -> int:
    """One token for each patch."""
    return num_patches


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorSpec:
    """A projector: `build(in_features, out_features, **options)` maps float[N, P, in] to float[N, P', out].

    `num_tokens(num_patches, **options)` tells P' and raises `ValueError` where the options do not fit. Added in 0.1.
    """

    name: str
    build: Callable[..., "nn.Module"]
    num_tokens: Callable[..., int] = same_number
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """A data source: `load(**options)` yields raw records in a fixed order. Added in 0.1.

    `files(**options)` names what it reads, so that a cached token store notices a change and a missing file is
    reported before anything is read. `load_from(start, **options)` yields what `load` yields after the first `start`
    records, without reading those: looking at one record and resuming a stream need it. A record that cannot be read,
    while those after it can, is yielded as a `BadRecord`. `suffixes` are the file names it is the usual source for, in
    lower case with the dot: `mmft data check FILE` looks there.
    """

    name: str
    load: Callable[..., Iterable[RawRecord | BadRecord]]
    files: Callable[..., Sequence[Path]] | None = None
    load_from: Callable[..., Iterable[RawRecord | BadRecord]] | None = None
    summary: str = ""
    suffixes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemText:
    """A system text by name, for `data.datasets.*.system_text` and for chat. Added in 0.1."""

    name: str
    text: str
    source: str = ""


def usable() -> str | None:
    """Nothing is missing."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that a model may call in chat: `run(**arguments)` returns the result as text, which is never executed.

    `description` and `parameters`, a JSON schema of an object, are what the model is told; `summary` is for people.
    `run` is given arguments that fit the schema, raises `MmftError` for what it cannot do, and ends by itself in some
    seconds. `unavailable()` says why the tool cannot be used here (no key, no network), or None. Added in 0.1.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., str]
    unavailable: Callable[[], str | None] = usable
    summary: str = ""

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's form, as `Conversation.tools` has it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDir:
    """A folder of configs that `list-cfg`, `copy-cfg` and `train NAME` find. Added in 0.1."""

    path: Path

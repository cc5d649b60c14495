"""What a plugin may rely on, held as text: a change to a public signature shows in review, as a change to this file.

The contract is `mmft`, `mmft.hookspecs`, `mmft.specs` and `mmft.types`. Where a test here fails, either the change was
not meant, or it belongs into CHANGELOG and the new text into `SURFACE`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmft

SURFACE = {
    "hookspecs": """
hookspec = pluggy.HookspecMarker('mmft')
hookimpl = pluggy.HookimplMarker('mmft')
@hookspec mmft_data_maps() -> Iterable[DataMap]
@hookspec mmft_chat_templates() -> Iterable[ChatTemplate]
@hookspec mmft_vision_encoders() -> Iterable[VisionEncoderSpec]
@hookspec mmft_projectors() -> Iterable[ProjectorSpec]
@hookspec mmft_datasets() -> Iterable[DatasetSpec]
@hookspec mmft_system_texts() -> Iterable[SystemText]
@hookspec mmft_tools() -> Iterable[Tool]
@hookspec mmft_config_dirs() -> Iterable[ConfigDir]
@hookspec mmft_check_config(config: 'TrainConfig', plugins: 'Plugins') -> Iterable[Problem]
@hookspec mmft_callbacks(config: 'TrainConfig') -> Iterable['TrainerCallback']
@hookspec mmft_add_commands(cli: 'click.Group') -> None
""",
    "specs": """
NAME_PATTERN = re.compile('[a-z0-9_]+')
@runtime_checkable RenderFn(Protocol)
    __call__(self, conversation: Conversation, /, *, generation_prompt: bool=False) -> Sequence[Segment]
@dataclass(frozen=True, slots=True, kw_only=True) DataMap()
    name: str
    fn: Callable[[RawRecord], Sample | None]
    summary: str = ''
    columns: tuple[str, ...] = ()
    examples: Sequence[RawRecord] = ()
    write: Callable[[Sample], RawRecord] | None = None
@dataclass(frozen=True, slots=True, kw_only=True) ChatTemplate()
    name: str
    render: RenderFn
    stop: tuple[str, ...] = ()
    supports_tools: bool = False
    source: str = ''
    bind: Callable[[Any], 'ChatTemplate'] | None = None
    compare: bool = True
    rewrites_history: bool = False
    read_calls: Callable[[str], tuple[str, tuple[ToolCall, ...]]] | None = None
    call_marks: tuple[str, ...] = ()
    for_tokenizer(self, tokenizer: Any) -> 'ChatTemplate'
@dataclass(frozen=True, slots=True, kw_only=True) VisionInfo()
    hidden_size: int
    num_patches: int
    transform: Callable[['PILImage.Image'], 'Tensor']
@dataclass(frozen=True, slots=True, kw_only=True) VisionEncoderSpec()
    name: str
    describe: Callable[..., VisionInfo]
    build: Callable[..., 'nn.Module']
    summary: str = ''
    hub_option: str | None = None
same_number(num_patches: int, **options: Any) -> int
@dataclass(frozen=True, slots=True, kw_only=True) ProjectorSpec()
    name: str
    build: Callable[..., 'nn.Module']
    num_tokens: Callable[..., int] = same_number
    summary: str = ''
@dataclass(frozen=True, slots=True, kw_only=True) DatasetSpec()
    name: str
    load: Callable[..., Iterable[RawRecord | BadRecord]]
    files: Callable[..., Sequence[Path]] | None = None
    load_from: Callable[..., Iterable[RawRecord | BadRecord]] | None = None
    summary: str = ''
    suffixes: tuple[str, ...] = ()
@dataclass(frozen=True, slots=True, kw_only=True) SystemText()
    name: str
    text: str
    source: str = ''
usable() -> str | None
@dataclass(frozen=True, slots=True, kw_only=True) Tool()
    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., str]
    unavailable: Callable[[], str | None] = usable
    summary: str = ''
    @property schema(self) -> dict[str, Any]
@dataclass(frozen=True, slots=True, kw_only=True) ConfigDir()
    path: Path
""",
    "types": """
IGNORE_INDEX = -100
Role: TypeAlias = Literal['system', 'user', 'assistant', 'tool']
RawRecord: TypeAlias = Mapping[str, Any]
@dataclass(frozen=True, slots=True) BadRecord()
    reason: str
@dataclass(frozen=True, slots=True) Text()
    text: str
@dataclass(frozen=True, slots=True) Image()
    source: str | Path
@dataclass(frozen=True, slots=True) ToolCall()
    name: str
    arguments: Mapping[str, Any]
    id: str | None = None
@dataclass(frozen=True, slots=True) Message()
    role: Role
    parts: tuple[Text | Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    loss: bool | None = None
    call_id: str | None = None
    reasoning: str | None = None
    @property text(self) -> str
    @property images(self) -> tuple[Image, ...]
    @property is_trained(self) -> bool
@dataclass(frozen=True, slots=True) Conversation()
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    @property images(self) -> tuple[Image, ...]
@dataclass(frozen=True, slots=True) Document()
    text: str
Sample: TypeAlias = Conversation | Document
@dataclass(frozen=True, slots=True) Segment()
    content: str | Image
    loss: bool = False
    markup: bool = False
@dataclass(frozen=True, slots=True) TokenizedSample()
    input_ids: 'NDArray[np.int32]'
    loss_mask: 'NDArray[np.bool_]'
    images: tuple[Image, ...] = ()
@dataclass(frozen=True, slots=True) PackedSample()
    samples: tuple[TokenizedSample, ...]
Batch(TypedDict)
    input_ids: 'Tensor'
    labels: 'Tensor'
    position_ids: NotRequired['Tensor']
    attention_mask: NotRequired['Tensor']
    pixel_values: NotRequired['Tensor']
    image_features: NotRequired['Tensor']
""",
}
EXPORTS = [
    "BadRecord",
    "ChatTemplate",
    "ConfigDir",
    "Conversation",
    "DataError",
    "DataMap",
    "DatasetSpec",
    "Document",
    "Image",
    "Message",
    "MmftError",
    "Problem",
    "ProjectorSpec",
    "RawRecord",
    "Sample",
    "Segment",
    "SystemText",
    "Text",
    "Tool",
    "ToolCall",
    "VisionEncoderSpec",
    "VisionInfo",
    "__version__",
    "hookimpl",
]


def surface(module: str) -> list[str]:
    """The public names of a module as they are written: fields with defaults, functions and methods with arguments."""
    path = Path(mmft.__file__).with_name(f"{module}.py")
    return [line for node in ast.parse(path.read_text("utf-8")).body for line in lines_of(node)]


def lines_of(node: ast.stmt, indent: str = "") -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__call__"):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        marks = "".join(f"@{ast.unparse(mark)} " for mark in node.decorator_list)
        yield f"{indent}{marks}{node.name}({ast.unparse(node.args)}){returns}"
    elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        marks = "".join(f"@{ast.unparse(mark)} " for mark in node.decorator_list)
        yield f"{marks}{node.name}({', '.join(map(ast.unparse, node.bases))})"
        for inner in node.body:
            yield from lines_of(inner, "    ")
    elif isinstance(node, ast.AnnAssign | ast.Assign):
        text = ast.unparse(node)
        if not text.startswith("_"):
            yield indent + text


@pytest.mark.parametrize("module", SURFACE)
def test_the_public_surface_is_what_it_was(module: str) -> None:
    assert surface(module) == SURFACE[module].strip().splitlines()


def test_mmft_exports_exactly_these_names() -> None:
    assert sorted(mmft.__all__) == EXPORTS
    assert all(hasattr(mmft, name) for name in EXPORTS)


def test_every_spec_and_sample_type_is_exported() -> None:
    """A plugin needs no import from below `mmft` to write a map or a spec."""
    classes = {re.search(r"(\w+)\(\)$", line) for line in surface("specs") if line.startswith("@dataclass")}
    assert {found[1] for found in classes if found} - set(EXPORTS) == set() and len(classes) == 9
    assert {"BadRecord", "Conversation", "Document", "Message", "Text", "Image", "ToolCall", "Segment"} <= set(EXPORTS)

"""docs/configs.md has every field of every part, with its type and default, and nothing else."""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmft.config import LLM, Data, Dataset, Evaluation, Lora, Model, Optim, Prompt, Runtime, TrainConfig, Use, Vision

DOC = Path(__file__).parents[2] / "docs" / "configs.md"
PARTS: tuple[type[BaseModel], ...] = (
    TrainConfig, Model, LLM, Lora, Vision, Data, Dataset, Optim, Runtime, Evaluation, Prompt,
)  # fmt: skip
SYMBOLS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "at least"}


def type_text(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    """A type as the page writes it: `int > 0`, `path or none`, `one of "a", "b"`."""
    if hasattr(annotation, "__metadata__"):
        return type_text(get_args(annotation)[0], annotation.__metadata__)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(option) for option in inner)
    if origin is Literal:
        values = ", ".join(f'"{value}"' for value in inner)
        return f"one of {values}" if len(inner) > 1 else values
    if origin is tuple:
        if inner[-1] is not Ellipsis:
            return f"({', '.join(type_text(option) for option in inner)})"
        return f"tuple of {type_text(inner[0])}" + _limits(metadata)
    names = {type(None): "none", Path: "path", Use: "`use(...)`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + _limits(metadata)


def _limits(metadata: Any) -> str:
    found = [(symbol, getattr(m, key, None)) for m in metadata for key, symbol in SYMBOLS.items()]
    bounds = [f"{symbol} {value}" for symbol, value in found if value is not None]
    return f" {', '.join(bounds)}" if bounds else ""


def default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.default
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


def rows(part: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    for name, info in part.model_fields.items():
        yield f"`{name}`", type_text(info.annotation, info.metadata), default_text(info)


def documented(part: type[BaseModel]) -> list[tuple[str, ...]]:
    """The rows of the table under the part's heading, without the column of meanings."""
    section = re.search(rf"^### `{part.__name__}`.*?(?=^##|\Z)", DOC.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert section, f"no heading ### `{part.__name__}`"
    lines = [line for line in section[0].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == 4 and row[3].strip(" |") for row in cells), cells
    return [tuple(row[:3]) for row in cells]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_field_is_documented_with_its_type_and_default(part: type[BaseModel]) -> None:
    assert documented(part) == list(rows(part))


def test_no_part_is_left_out() -> None:
    """Walk the tree from the top: what it reaches is what the page has headings for."""
    reached, waiting = set(), [TrainConfig]
    while waiting:
        part = waiting.pop()
        reached.add(part.__name__)
        text = [info.annotation for info in part.model_fields.values()]
        options = [o for a in text for o in (a, *get_args(a)) if isinstance(o, type) and issubclass(o, BaseModel)]
        waiting += [o for o in options if o is not Use and o.__name__ not in reached]
    headings = set(re.findall(r"^### `(\w+)`", DOC.read_text("utf-8"), re.MULTILINE))
    assert reached == headings == {part.__name__ for part in PARTS}

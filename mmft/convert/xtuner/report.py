"""What reading an XTuner config found, setting by setting: nothing in it is passed over in silence.

`Node` hands out the settings of one dict and knows which were never asked for; those are reported when it is closed.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from mmft.convert.xtuner.syntax import Named, Unread

SHOWN = 60  # characters of a value in a report


@dataclass
class Report:
    """`edits` must be made by hand, `differs` is done otherwise here, `lost` has no counterpart."""

    edits: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def edit(self, text: str) -> None:
        """Something that the written config lacks."""
        _once(self.edits, text)

    def differ(self, text: str) -> None:
        """Something that works otherwise here."""
        _once(self.differs, text)

    def lose(self, text: str) -> None:
        """A setting that has no counterpart."""
        _once(self.lost, text)


def _once(lines: list[str], text: str) -> None:
    if text not in lines:
        lines.append(text)


def last_name(value: Any) -> str:
    """`alpaca_map_fn` of whatever names it: an import, a dotted string, or the `<function ...>` of a dumped config.

    `AutoModelForCausalLM` of `transformers.AutoModelForCausalLM.from_pretrained`: the name of a constructor says no
    more than its class.
    """
    text = value.dotted if isinstance(value, Named) else str(value or "")
    if found := re.match(r"<(?:function|class) '?([\w.]+)", text):
        text = found[1]
    parts = [part for part in text.split(".") if part not in ("from_pretrained", "load")]
    return parts[-1] if parts else ""


def shown(value: Any) -> str:
    """A value as a report shows it: short, on one line."""
    if isinstance(value, Named):
        return value.dotted
    if isinstance(value, Unread):
        return f"`{value.source}`"
    if isinstance(value, dict) and "type" in value:
        return f"dict(type={last_name(value['type'])}, ...)"
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class Node:
    """One dict of the config, at `path`; asks for settings go through `take`."""

    def __init__(self, values: dict[str, Any], path: str, report: Report) -> None:
        self.values = values
        self.path = path
        self.report = report
        self._taken: set[str] = {"type", "_delete_"}

    @property
    def kind(self) -> str:
        """The class it builds, by its last name; empty where it names none."""
        return last_name(self.values.get("type"))

    def where(self, key: str) -> str:
        """`model.llm.torch_dtype`."""
        return f"{self.path}.{key}" if self.path else key

    def take(self, key: str, default: Any = None) -> Any:
        """A setting; one that cannot be read without running the config is an edit, and the default is used."""
        self._taken.add(key)
        value = self.values.get(key, default)
        if isinstance(value, Unread):
            self.report.edit(
                f"{self.where(key)}: cannot be told without running it: {value.source} (line {value.line})"
            )
            return default
        return value

    def number(self, key: str, default: float) -> float:
        """A setting that is a number."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.report.edit(f"{self.where(key)}: {shown(value)} is no number")
            return default
        return value

    def node(self, key: str) -> "Node | None":
        """A setting that is a dict; None where there is none."""
        value = self.take(key)
        if isinstance(value, dict):
            return Node(value, self.where(key), self.report)
        if value is not None:
            self.report.edit(f"{self.where(key)}: {shown(value)} is no dict")
        return None

    def nodes(self, key: str) -> "list[Node]":
        """A setting that is a list of dicts, or one dict."""
        value = self.take(key) or []
        items = value if isinstance(value, list | tuple) else [value]
        named = [(f"{self.where(key)}.{index}", item) for index, item in enumerate(items)]
        for where, item in named:
            if not isinstance(item, dict):
                self.report.edit(f"{where}: {shown(item)} is no dict")
        return [Node(item, where, self.report) for where, item in named if isinstance(item, dict)]

    def close(self, *, same: Collection[str] = ()) -> None:
        """Report what was not asked for; `same` are settings that mean nothing else here, or are always so."""
        for key, value in self.values.items():
            if key not in self._taken and key not in same and value is not None:
                self.report.lose(f"{self.where(key)} = {shown(value)}")

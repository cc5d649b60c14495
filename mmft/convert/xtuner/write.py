"""Write a config in house style: a tree of calls, on one line where it fits, else an argument a line."""

from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

WIDTH = 120  # characters of a line
INDENT = "    "


@dataclass(frozen=True, slots=True)
class Raw:
    """Source text that stands as it is: the name of a setting, or `DATA_ROOT / "train.json"`."""

    text: str


@dataclass(frozen=True, slots=True)
class Arg:
    """An argument of a call, with the comment behind it and the heading above it; no name means by position."""

    name: str
    value: Any
    comment: str = ""
    heading: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """`Lora(r=64, alpha=16)`."""

    function: str
    arguments: tuple[Arg, ...]

    def __init__(self, function: str, *positional: Any, **named: Any) -> None:
        """Named arguments that are None are left out: every field of a config has that, or no, default."""
        arguments = [item if isinstance(item, Arg) else Arg("", item) for item in positional]
        arguments += [Arg(name, value) for name, value in named.items()]
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "arguments", tuple(item for item in arguments if item.value is not None))


def path_of(text: str) -> Call:
    """A `Path(...)`."""
    return Call("Path", text.removeprefix("./"))


def source(value: Any, depth: int = 0, used: int = 0) -> str:
    """Python source of a value, for a place `depth` levels in where `used` characters of the line are taken."""
    line = one_line(value)
    if line is not None and len(INDENT) * depth + used + _width(line) + len(",") <= WIDTH:
        return line
    inner = INDENT * (depth + 1)
    if isinstance(value, Call):
        lines = [f"{value.function}("]
        for item in value.arguments:
            lines += [f"{inner}{item.heading}"] if item.heading else []
            name = f"{item.name}=" if item.name else ""
            comment = f"  # {item.comment}" if item.comment else ""
            lines.append(f"{inner}{name}{source(item.value, depth + 1, len(name) + len(comment))},{comment}")
        return "\n".join([*lines, f"{INDENT * depth})"])
    if isinstance(value, tuple | list) and value:
        lines = [f"{inner}{source(item, depth + 1, 1)}," for item in value]
        return "\n".join(["(", *lines, f"{INDENT * depth})"])
    return _literal(value)


def _width(text: str) -> int:
    """Columns of a text: a Chinese character takes two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def one_line(value: Any) -> str | None:
    """All of it on one line; None where a comment or a heading wants its own."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Call):
        parts = []
        for item in value.arguments:
            text = one_line(item.value)
            if item.comment or item.heading or text is None:
                return None
            parts.append(f"{item.name}={text}" if item.name else text)
        return f"{value.function}({', '.join(parts)})"
    if isinstance(value, tuple | list):
        texts = [one_line(item) for item in value]
        if any(text is None for text in texts):
            return None
        joined = ", ".join(text for text in texts if text is not None)
        return f"({joined}{',' if len(texts) == 1 else ''})"
    return _literal(value)


def _literal(value: Any) -> str:
    """As the formatter writes it: double quotes, and 2e-5 where Python says 2e-05."""
    if isinstance(value, float):
        return _number(value)
    if not isinstance(value, str):
        return repr(value)
    text = repr(value)
    if text[0] == "'" and '"' not in text:
        return f'"{text[1:-1]}"'
    return text


def _number(value: float) -> str:
    """`2e-5`, `0.03`, `1e-3`, `2.0`: the shorter of the two spellings, a rate as people write it."""
    text = repr(value)
    if 0 < abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.12e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text

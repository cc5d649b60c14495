"""Read an XTuner (MMEngine) config without running it: its assignments, from the syntax tree.

What such a config computes is little: constants, sums of them, `dict(...)`, f-strings, an `if` over a flag. That much
is worked out here. A name that is imported stays a name (`Named`), and anything else stays its source text (`Unread`),
which matters only where a setting needs it. Relative files of `with read_base():` and `_base_` are read the same way.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmft.convert.xtuner.parse import parsed
from mmft.errors import ConfigError, Problem

MAX_DEPTH = 8  # files that build on each other
MAX_SIZE = 100_000  # items of a list or characters of a text that arithmetic may make
LONG_FIELD = re.compile(r"\d{4}|\*")  # a width that would write thousands of spaces
_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitOr: operator.or_,
}
_UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_PURE = (int, float, str, bool, list, tuple, len, min, max, round, abs)
_CALLS: dict[str, Callable[..., Any]] = {
    **{function.__name__: function for function in _PURE},
    "os.path.join": lambda *parts: str(Path(*parts)),
    "osp.join": lambda *parts: str(Path(*parts)),
    "Path": lambda *parts: str(Path(*parts)),
    "pathlib.Path": lambda *parts: str(Path(*parts)),
}


@dataclass(frozen=True, slots=True)
class Named:
    """Something imported, by its dotted name: `xtuner.utils.PROMPT_TEMPLATE.vicuna`. It is never imported here."""

    dotted: str


@dataclass(frozen=True, slots=True)
class Unread:
    """An expression that only running it would tell."""

    source: str
    line: int


class _Cannot(Exception):
    """This expression cannot be worked out."""


@dataclass
class _Reader:
    """The names of one file as far as it has been read."""

    path: Path
    depth: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def statements(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                self.values[name] = Named(alias.name if alias.asname else name)
        elif isinstance(node, ast.ImportFrom):
            self.imported(node)
        elif isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                self.assign(target, value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value))
        elif isinstance(node, ast.AugAssign):
            total = ast.BinOp(_loaded(node.target), node.op, node.value)
            self.assign(node.target, self.value(ast.copy_location(total, node)))
        elif isinstance(node, ast.If):
            self.branch(node)
        elif isinstance(node, ast.With):
            self.statements(node.body)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self.changed(node.value)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.values[node.name] = Unread(f"{node.name} of this file", node.lineno)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.values.pop(target.id, None)

    def imported(self, node: ast.ImportFrom) -> None:
        """A relative import brings the values of a config beside this one; any other only names."""
        base = self.path.parent.joinpath(*[".."] * (node.level - 1), *(node.module or "").split("."))
        file = base.with_suffix(".py")
        if node.level and file.is_file():
            theirs = _read(file, self.depth + 1)
            for alias in node.names:
                if alias.name == "*":
                    self.values.update({k: v for k, v in theirs.items() if not k.startswith("_")})
                else:
                    self.values[alias.asname or alias.name] = theirs.get(alias.name, Named(f"{file.stem}.{alias.name}"))
            return
        if node.level and any(alias.name == "*" for alias in node.names):
            raise ConfigError([Problem(f"{self.path}:{node.lineno}", f"builds on {file}, which does not exist")])
        for alias in node.names:
            self.values[alias.asname or alias.name] = Named(f"{node.module or ''}.{alias.name}")

    def branch(self, node: ast.If) -> None:
        """The branch that is taken; where the condition is unknown, both make their names unknown."""
        test = self.value(node.test)
        if not isinstance(test, Unread | Named):
            self.statements(node.body if test else node.orelse)
            return
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                self.values[inner.id] = Unread(f"{inner.id} under `if {ast.unparse(node.test)}`", node.lineno)

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.values[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, list | tuple):
            for part, item in zip(target.elts, value, strict=False):
                self.assign(part, item)
        elif isinstance(target, ast.Subscript | ast.Attribute):
            holder: Any = self.value(target.value)
            key: Any = self.value(target.slice) if isinstance(target, ast.Subscript) else target.attr
            if isinstance(holder, (dict, list)):
                try:
                    holder[key] = value
                except (IndexError, TypeError):
                    return

    def changed(self, call: ast.Call) -> None:
        """`custom_hooks.append(...)`, `model.update(...)`: a call for its effect."""
        if not isinstance(call.func, ast.Attribute):
            return
        holder = self.value(call.func.value)
        arguments = [self.value(argument) for argument in call.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in call.keywords if keyword.arg}
        if isinstance(holder, list) and call.func.attr == "append" and len(arguments) == 1:
            holder.append(arguments[0])
        elif isinstance(holder, list) and call.func.attr == "extend" and arguments and isinstance(arguments[0], list):
            holder.extend(arguments[0])
        elif isinstance(holder, dict) and call.func.attr == "update":
            for other in arguments:
                holder.update(other if isinstance(other, dict) else {})
            holder.update(named)

    def value(self, node: ast.expr) -> Any:
        """What an expression is worth, or `Unread`."""
        try:
            return self._value(node)
        except (_Cannot, ArithmeticError, TypeError, ValueError, LookupError):
            return Unread(ast.unparse(node), getattr(node, "lineno", 0))

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self.values.get(node.id, Named(node.id))
            case ast.Attribute():
                return self._attribute(node)
            case ast.List():
                return [self.value(item) for item in node.elts]
            case ast.Tuple():
                return tuple(self.value(item) for item in node.elts)
            case ast.Dict():
                return self._dict(node)
            case ast.BinOp():
                return self._binary(node)
            case ast.UnaryOp():
                return _UNARY[type(node.op)](_known(self.value(node.operand)))
            case ast.BoolOp():
                return self._boolean(node)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp():
                return self.value(node.body if _known(self.value(node.test)) else node.orelse)
            case ast.JoinedStr():
                return "".join(self._text(part) for part in node.values)
            case ast.Subscript():
                return _known(self.value(node.value))[_known(self.value(node.slice))]
            case ast.Call():
                return self._call(node)
        raise _Cannot

    def _attribute(self, node: ast.Attribute) -> Any:
        holder = self.value(node.value)
        if isinstance(holder, Named):
            return Named(f"{holder.dotted}.{node.attr}")
        if isinstance(holder, dict) and node.attr in holder:
            return holder[node.attr]
        raise _Cannot

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            if key is None:
                made.update(_known(self.value(item)))
            else:
                made[_known(self.value(key))] = self.value(item)
        return made

    def _binary(self, node: ast.BinOp) -> Any:
        left, right = _known(self.value(node.left)), _known(self.value(node.right))
        if isinstance(node.op, ast.Pow) and (abs(left) > 1e6 or abs(right) > 64):
            raise _Cannot
        for items, times in ((left, right), (right, left)) if isinstance(node.op, ast.Mult) else ():
            if isinstance(items, str | list | tuple) and len(items) * times > MAX_SIZE:
                raise _Cannot
        if isinstance(node.op, ast.Mod) and isinstance(left, str) and LONG_FIELD.search(left):
            raise _Cannot
        result = _BINARY[type(node.op)](left, right)
        if isinstance(result, str | list | tuple) and len(result) > MAX_SIZE:
            raise _Cannot
        return result

    def _boolean(self, node: ast.BoolOp) -> Any:
        result: Any = None
        for item in node.values:
            result = _known(self.value(item))
            if bool(result) is isinstance(node.op, ast.Or):
                return result
        return result

    def _compare(self, node: ast.Compare) -> bool:
        left = _known(self.value(node.left))
        for step, item in zip(node.ops, node.comparators, strict=True):
            right = _known(self.value(item))
            if not _COMPARE[type(step)](left, right):
                return False
            left = right
        return True

    def _text(self, node: ast.expr) -> str:
        if isinstance(node, ast.FormattedValue):
            parts = node.format_spec.values if isinstance(node.format_spec, ast.JoinedStr) else []
            shape = "".join(self._text(part) for part in parts)
            if LONG_FIELD.search(shape) or node.conversion not in (-1, ord("s")):
                raise _Cannot
            return format(_known(self.value(node.value)), shape)
        return str(_known(self.value(node)))

    def _call(self, node: ast.Call) -> Any:
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if called in ("dict", "Config", "ConfigDict"):
            return self._made_dict(node, named)
        arguments = [_known(self.value(argument)) for argument in node.args]
        if called.rpartition(".")[2] in ("copy", "deepcopy"):
            holder = node.func.value if isinstance(node.func, ast.Attribute) else node.func
            return _copied(arguments[0] if arguments else _known(self.value(holder)))
        if called in _CALLS and not named:
            return _CALLS[called](*arguments)
        raise _Cannot

    def _made_dict(self, node: ast.Call, named: Mapping[str | None, Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for argument in node.args:
            made.update(_known(self.value(argument)))
        for key, item in named.items():
            made.update(_known(item) if key is None else {key: item})
        return made


def _loaded(target: ast.expr) -> ast.expr:
    """A target as an expression that is read."""
    copied = ast.parse(ast.unparse(target), mode="eval").body
    return ast.copy_location(copied, target)


def _known(value: Any) -> Any:
    if isinstance(value, Named | Unread):
        raise _Cannot
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def read_assignments(path: Path) -> dict[str, Any]:
    """Every name a config file binds, with its value. Raises `ConfigError` where it is no Python."""
    return _read(path, 0)


def _read(path: Path, depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        raise ConfigError([Problem(str(path), f"more than {MAX_DEPTH} config files build on each other")])
    reader = _Reader(path, depth)
    reader.statements(parsed(path).body)
    bases = reader.values.pop("_base_", ())
    below: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        below = _merged(below, _read(path.parent / str(base), depth + 1))
    return _merged(below, reader.values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """MMEngine's inheritance: dicts are merged key by key unless `_delete_` says otherwise."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict) and not value.get("_delete_"):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result

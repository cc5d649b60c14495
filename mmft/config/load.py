"""From a name, a .py file or a dumped config.json to a `TrainConfig`, with `--set` overrides on top."""

import ast
import importlib.util
import json
import re
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from mmft import __version__
from mmft.config.foreign import refuse_xtuner_config, xtuner_name_hint
from mmft.config.schema import TrainConfig, Use
from mmft.errors import AmbiguousName, ConfigError, Problem, UnknownName, did_you_mean
from mmft.foreign_paths import windows_hint
from mmft.plugins import Plugins

_MISSING = object()


@dataclass(frozen=True, slots=True)
class LibraryConfig:
    """A config that a plugin ships: `list-cfg` shows it, `train` takes it by name."""

    name: str
    path: Path
    plugin: str
    summary: str


def load_config(reference: str, plugins: Plugins, settings: Sequence[str] = ()) -> TrainConfig:
    """The config a user names, with `a.b.c=value` settings applied. Raises `ConfigError` with all problems."""
    path = find_config(reference, plugins)
    config = _read_json(path) if path.suffix == ".json" else _run_python(path)
    return override(config, parse_settings(settings), where="--set ") if settings else config


def find_config(reference: str, plugins: Plugins) -> Path:
    """The file behind a path or a shipped name."""
    path = Path(reference)
    if path.suffix in (".py", ".json"):
        if path.is_file():
            return path
        hint = windows_hint(reference) or "give a .py or .json config, or a name of `list-cfg`"
        raise ConfigError([Problem(reference, "no such file", hint)])
    if path.is_dir() and (path / "config.json").is_file():
        return path / "config.json"
    qualifier, _, short = reference.rpartition("/")
    library = list(list_configs(plugins))
    found = [c for c in library if c.name == short and qualifier in ("", c.plugin)]
    if len(found) > 1:
        choices = ", ".join(f"{c.plugin}/{c.name}" for c in found)
        raise AmbiguousName(f"config {short!r} is offered by {len(found)} plugins; write one of: {choices}")
    if not found and (hint := windows_hint(reference)):
        raise ConfigError([Problem(reference, "no such file or folder", hint)])
    if not found:
        names = [c.name for c in library]
        hint = xtuner_name_hint(short, names) or did_you_mean(short, names)
        raise UnknownName(f"no config file or shipped config named {reference!r}{hint}; see: mmft list-cfg")
    return found[0].path


def list_configs(plugins: Plugins) -> Iterable[LibraryConfig]:
    """Every shipped config, by name. Reads docstrings only; no config is executed."""
    for plugin, folder in plugins.config_dirs():
        for path in sorted(folder.path.rglob("*.py"), key=lambda p: p.stem):
            if path.stem != "__init__":
                yield LibraryConfig(path.stem, path, plugin.name, _summary(path))


def copy_config(name: str, destination: Path, plugins: Plugins) -> Path:
    """Copy a shipped config to a file or folder; never overwrites."""
    source = find_config(name, plugins)
    target = destination / source.name if destination.is_dir() or not destination.suffix else destination
    if target.exists():
        raise ConfigError([Problem(str(target), "exists already", "choose another file or folder")])
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".py":
        target.write_text(f"# from mmft {__version__}: {source.stem}\n{source.read_text('utf-8')}", "utf-8")
    else:
        shutil.copyfile(source, target)
    return target


def dump_config(config: TrainConfig) -> str:
    """The resolved config as JSON, which `mmft train` accepts again."""
    return config.model_dump_json(indent=2)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`a.b.c=value` texts to paths and values; `none`, numbers, booleans and JSON are read by the field's type."""
    problems = [Problem(f"--set {s}", "has no '='", "write: --set optim.lr=1e-4") for s in settings if "=" not in s]
    if problems:
        raise ConfigError(problems)
    return {path.strip(): _Typed(text) for path, _, text in (s.partition("=") for s in settings)}


@dataclass(frozen=True, slots=True)
class _Typed:
    """What a person typed after `=`; what it means depends on the field it lands in."""

    text: str

    def for_field(self, owner: type[BaseModel], name: str) -> Any:
        """The text itself where the field takes it as it is (a string, `quantization=none`), else what it spells."""
        spelled = _value_of(self.text)
        kinds: TypeAdapter[Any] = TypeAdapter(owner.model_fields[name].annotation or Any)
        for value in (spelled, self.text):
            try:
                kinds.validate_python(value)
            except ValidationError:
                continue
            return value
        return spelled


def _value_of(text: str) -> Any:
    if text.strip().lower() in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        lowered = text.strip().lower()
        return {"true": True, "false": False}.get(lowered, text)


def override(config: TrainConfig, values: Mapping[str, Any], *, where: str = "") -> TrainConfig:
    """A copy with the values at the given paths replaced, each checked against its field's type.

    A path names fields, indices into tuples and keys of `use` options: `data.datasets.0.source.path`.
    """
    tree = config.model_dump(mode="python")
    problems = []
    for path, value in values.items():
        problem = _set_at(tree, config, path, value)
        if problem:
            problems.append(Problem(f"{where}{path}={getattr(value, 'text', value)}", problem))
    try:
        changed = validate(tree, where)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return changed


def _set_at(tree: Any, node: Any, path: str, value: Any) -> str:
    """Put a value into the dumped tree; returns what is wrong with the path, or an empty string."""
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        here = ".".join(keys[:depth]) or "the config"
        child: Any
        if isinstance(node, Use):
            if not last:
                return f"{here} takes options only; {key!r} cannot be followed by another name"
            tree[key] = _value_of(value.text) if isinstance(value, _Typed) else value
            return ""
        if isinstance(node, tuple):
            if not key.isdigit() or int(key) >= len(node):
                indices = "0" if len(node) == 1 else f"an index of 0 to {len(node) - 1}"
                allowed = f"write {indices}" if node else "give the whole list as JSON"
                return f"{here} has {len(node)} entr{'y' if len(node) == 1 else 'ies'}; {allowed}, not {key!r}"
            key, child = int(key), node[int(key)]  # type: ignore[assignment]
        elif isinstance(node, BaseModel):
            if key not in type(node).model_fields:
                return _no_field(type(node), key)
            child = getattr(node, key, None)  # a part made by _empty_part lacks its required fields
        else:
            return f"{here} is {node!r} and has no field {key!r}"
        if isinstance(tree.get(key) if isinstance(tree, dict) else None, tuple):
            tree[key] = list(tree[key])
        if last:
            if isinstance(value, _Typed):
                value = value.for_field(type(node), key) if isinstance(node, BaseModel) else _value_of(value.text)
            tree[key] = value
            return ""
        if child is None and isinstance(node, BaseModel):
            child = _empty_part(type(node), str(key))
            if child is not None and not isinstance(tree.get(key), dict):  # an earlier setting may have begun it
                tree[key] = {}
        tree, node = tree[key], child
    return ""


def _empty_part(owner: type[BaseModel], name: str) -> Any:
    """An unvalidated part for an optional field that is None, so that its fields can be named: `model.llm.lora.r`."""
    for option in get_args(owner.model_fields[name].annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option.model_construct()
    return None


def _no_field(owner: type[BaseModel], key: str) -> str:
    fields = list(owner.model_fields)
    text = f"{owner.__name__} has no field {key!r}; it has {', '.join(fields)}"
    homes = [path for path in _leaf_paths(TrainConfig, "") if path.rpartition(".")[2] == key]
    if homes and owner is TrainConfig:
        return f"{text}; did you mean {homes[0]!r}?"
    close = did_you_mean(key, fields) or next((f"; did you mean {f!r}?" for f in fields if f.startswith(key)), "")
    return text + close


def _leaf_paths(part: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, info in part.model_fields.items():
        options = [info.annotation, *get_args(info.annotation)]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel) and o is not Use]
        yield f"{prefix}{name}"
        for option in nested:
            yield from _leaf_paths(option, f"{prefix}{name}.")


def validate(tree: Any, where: str = "") -> TrainConfig:
    """A dumped tree to a config; pydantic's errors become `Problem`s with the path of each."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems_of(error, where)) from None


def problems_of(error: ValidationError, where: str = "") -> list[Problem]:
    """One `Problem` for each of pydantic's errors, in our words."""
    problems: dict[str, Problem] = {}
    for item in error.errors():
        # pydantic adds the branches of a union to the path: Lora, literal['all-linear'], tuple[str, ...]
        location = [part for part in item["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z]\w*", part)]
        path = ".".join(str(part) for part in location) or error.title
        if item["type"] == "extra_forbidden":
            owner, key = _owner_of(error.title, location), str(location[-1])
            what = _no_field(owner, key) if owner else f"no field {key!r}"
            path = ".".join(str(part) for part in location[:-1]) or error.title
        elif item["type"] == "missing":
            what = "is required"
        elif item["type"] == "literal_error":
            what = f"{item['input']!r} is not one of {item['ctx']['expected'].replace(' or ', ', ')}"
        else:
            what = f"{item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"
        branch = path if len(location) < len(item["loc"]) else f"{path} {len(problems)}"
        known = problems.get(branch)  # what each branch of one union says is one problem
        problems[branch] = Problem(where + path, f"{known.what}, or: {what}" if known else what)
    return list(problems.values())


def _owner_of(title: str, location: Sequence[Any]) -> type[BaseModel] | None:
    """The part class that a location's last key belongs to."""
    from mmft.config import schema

    node = getattr(schema, title, None)
    for key in location[:-1]:
        if isinstance(key, int) or node is None:
            continue
        annotation = node.model_fields[key].annotation if key in node.model_fields else None
        options = [annotation, *(inner for outer in get_args(annotation) for inner in (outer, *get_args(outer)))]
        node = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return node


def _read_json(path: Path) -> TrainConfig:
    try:
        return validate(json.loads(path.read_text("utf-8")), where=f"{path}: ")
    except ValueError as error:
        raise ConfigError([Problem(str(path), f"is not JSON: {error}")]) from None


def _run_python(path: Path) -> TrainConfig:
    """Execute a config file and take its `config`; what it got wrong is reported with file and line."""
    refuse_xtuner_config(path)
    name = f"mmft_user_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except ValidationError as error:
        raise ConfigError(problems_of(error, where=f"{path}:{_line_in(error, path)}: ")) from None
    except Exception as error:
        place = f"{path}:{_line_in(error, path)}"
        raise ConfigError([Problem(place, f"{type(error).__name__}: {error}")]) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    config = getattr(module, "config", _MISSING)
    if not isinstance(config, TrainConfig):
        found = "no such name" if config is _MISSING else f"a {type(config).__name__}"
        raise ConfigError([Problem(str(path), f"must bind `config = TrainConfig(...)`, found {found}")])
    return config


def _line_in(error: BaseException, path: Path) -> int:
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    return (lines[-1] or 0) if lines else 0


def _summary(path: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    except (SyntaxError, ValueError) as error:  # one bad file must not hide the others
        return f"cannot be read: {error}"
    return docstring.strip().partition("\n")[0]

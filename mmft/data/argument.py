"""What an argument of `mmft data` is: data, as a file, a folder or a glob, or a config."""

import re
from glob import has_magic
from pathlib import Path

from mmft.config.load import find_config
from mmft.data.formats import files_of, is_many, suffixes
from mmft.errors import AmbiguousName, ConfigError, Problem, UnknownName
from mmft.foreign_paths import windows_hint
from mmft.plugins import Plugins


def is_data_file(reference: str, plugins: Plugins) -> bool:
    """Whether a command's argument is data and not a config: by suffix, for .json and a folder by what is in it."""
    path, ends = Path(reference), tuple(suffixes(plugins))

    def named_so(file: Path) -> bool:
        return file.name.lower().endswith(ends)

    if path.is_dir():
        return not _is_config(reference, plugins) and any(map(named_so, files_of(path)))
    if is_many(path):
        return True
    if path.suffix.lower() != ".json":
        return named_so(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    return not (head.startswith("{") and {'"model"', '"data"', '"optim"'} <= set(re.findall(r'"\w+"', head)))


def refuse_missing(reference: str) -> None:
    """Raise `ConfigError` for a .json file that is not there: nobody knows whether data or a config was meant."""
    if reference.lower().endswith(".json") and not Path(reference).exists():
        hint = windows_hint(reference) or "give a data file, or a config: .py, .json or a name of `list-cfg`"
        raise ConfigError([Problem(reference, "no such file", hint)])


def _is_config(reference: str, plugins: Plugins) -> bool:
    """Whether a folder is that of a run, or is called as a shipped config."""
    try:
        find_config(reference, plugins)
    except UnknownName:
        return False
    except AmbiguousName:
        pass
    return True


def report_name(path: Path) -> str:
    """What the folder of a file's report is called: as the file, of a glob as the folder it looks in."""
    if is_many(path) and not path.is_dir():
        return next((part for part in reversed(path.parts) if not has_magic(part) and part != path.anchor), "files")
    return path.resolve().stem

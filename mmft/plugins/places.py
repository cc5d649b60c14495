"""An exception of somebody else's code in one line: what it is, and where in that code it was raised."""

import re
import traceback
from pathlib import Path
from types import ModuleType


def described(error: BaseException, module: ModuleType | str | None) -> str:
    """`KeyError: 'weights' (acme.py:12)`: the last line run in the package of `module`, a module or its name."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if isinstance(error, SyntaxError) else f"{text}{raised_at(error, module)}"  # that one says where itself


def raised_at(error: BaseException, module: ModuleType | str | None) -> str:
    """` (acme.py:12)`; empty where no code of the package of `module` ran."""
    name = module if isinstance(module, str) else getattr(module, "__name__", "")
    root = re.split("[.:]", name)[0]
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if root and (frame.f_globals.get("__name__") or "").partition(".")[0] == root
    ]
    return f" ({shown(lines[-1][0])}:{lines[-1][1]})" if lines else ""


def shown(path: str | None) -> str:
    """The name of a source file; of a package's `__init__.py` with its folder."""
    file = Path(path or "?")
    return f"{file.parent.name}/{file.name}" if file.name == "__init__.py" else file.name

"""Configs of another project that a person may hand to us: known at sight, never executed."""

import ast
from pathlib import Path

from mmft.errors import ConfigError, Problem

PACKAGES = ("xtuner", "mmengine")


def is_xtuner_config(path: Path) -> bool:
    """Whether a Python file is a config of XTuner 0.1: it imports from xtuner or mmengine, or names their classes.

    The second form is what XTuner itself writes into a work folder. The file is parsed, not run.
    """
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError, OSError):
        return False
    bound: set[str] = set()
    dotted = False
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES and not node.level:
            return True
        if isinstance(node, ast.Assign):
            bound.update(target.id for target in node.targets if isinstance(target, ast.Name))
            texts = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))
            dotted = dotted or any(isinstance(t, str) and t.split(".")[0] in PACKAGES and "." in t for t in texts)
    return dotted and {"model", "train_dataloader"} <= bound


def refuse_xtuner_config(path: Path) -> None:
    """Raise `ConfigError` with the command that converts it."""
    if is_xtuner_config(path):
        hint = f"convert it: mmft convert xtuner-config {path} {path.stem}_mmft.py"
        raise ConfigError([Problem(str(path), "is a config of XTuner 0.1, not of mmft", hint)])

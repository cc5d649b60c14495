"""Configs of another project that a person may hand to us: known at sight, never executed."""

import ast
import re
from collections.abc import Collection
from pathlib import Path

from mmft.errors import ConfigError, Problem

PACKAGES = ("xtuner", "mmengine")
# `internlm2_chat_7b_qlora_oasst1_e3`, `llava_..._e1_gpu8_pretrain`, `..._copy`: epochs stand in every name there
XTUNER_NAME = re.compile(r"\w+_e\d+(_gpu\d+)?(_\w+)?")


def is_xtuner_config(path: Path) -> bool:
    """Whether a Python file is a config of XTuner 0.1: it imports from xtuner or mmengine, or names their classes.

    The second form is what XTuner itself writes into a work folder. The file is parsed, not run.
    """
    try:
        tree = ast.parse(path.read_text("utf-8", errors="replace"))
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


def xtuner_name_hint(name: str, library: Collection[str]) -> str:
    """What to do about a name that is spelled as XTuner spells its configs: the closest of ours. Else an empty string.

    XTuner ships a config for each pair of model and data; here one for each kind of run, and the rest is a setting.
    """
    if not XTUNER_NAME.fullmatch(name) or not library:
        return ""
    theirs = set(name.split("_"))
    kind = theirs & {"llava", "pretrain", "qlora", "full"}

    def closeness(ours: str) -> tuple[int, int, int, int]:
        words = set(ours.split("_"))
        models = {word for word in words & theirs if re.match(r"[a-z]{3}", word)}  # `8b` says nothing alone
        of_other_kind = ("llava" in words) != ("llava" in theirs)
        return len(words & kind) - 2 * of_other_kind, len(models), -len(words - theirs), len(words)

    best = max(sorted(library), key=closeness)
    return (
        f", which is XTuner's spelling; mmft has one config for each kind of run: begin with 'mmft copy-cfg {best}', "
        f"then set model.llm.path and the data; or translate the file: mmft convert xtuner-config {name}.py"
    )

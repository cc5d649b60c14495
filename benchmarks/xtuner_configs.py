"""How many of XTuner's own SFT and LLaVA configs `mmft convert xtuner-config` translates with nothing left to do.

    pip download xtuner==0.1.23 --no-deps --python-version 3.10 --only-binary=:all:
    python benchmarks/xtuner_configs.py xtuner-0.1.23-py3-none-any.whl

Takes the wheel, or a folder of configs; nothing of it is run or installed. A config counts as translated where no edit
is left, the result loads, and `mmft check` finds nothing but files and packages that are not here. Each that does not
count is printed with its reasons.
"""

import re
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from mmft.config.check import find_problems
from mmft.config.load import load_config
from mmft.convert.xtuner.config import translate
from mmft.errors import ConfigError
from mmft.plugins import Plugins, load_plugins

MODEL = re.compile(r"type=(SupervisedFinetune|LLaVAModel)\b")
OF_THIS_MACHINE = re.compile(r"does not exist|is not a folder|is not installed|pip install")


def configs(source: Path, scratch: Path) -> list[tuple[str, Path]]:
    """(XTuner's class, file) of all configs of the two methods, from a wheel or a folder."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith("xtuner/configs/")])
        source = scratch
    found = [(MODEL.search(path.read_text("utf-8")), path) for path in sorted(source.rglob("*.py"))]
    return [(match[1], path) for match, path in found if match]


def reasons(path: Path, scratch: Path, plugins: Plugins) -> list[str]:
    """What is left to do by hand for one config; empty where it is translated."""
    try:
        made = translate(path, plugins)
        written = scratch / "written.py"
        written.write_text(made.text, "utf-8")
        problems = [str(problem) for problem in find_problems(load_config(str(written), plugins), plugins)]
    except ConfigError as error:
        return [f"refused: {problem.what}" for problem in error.problems]
    return made.report.edits + [f"check: {text}" for text in problems if not OF_THIS_MACHINE.search(text)]


def main(source: Path) -> None:
    """Translate all, print each that is not, and the counts."""
    plugins = load_plugins()
    done, total = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for kind, path in configs(source, scratch):
            left = reasons(path, scratch, plugins)
            total[kind] += 1
            done[kind] += not left
            if left:
                print(f"{path.stem}:", *left, sep="\n  - ")
    for kind in sorted(total):
        print(f"{kind}: {done[kind]} of {total[kind]}")
    print(f"all: {done.total()} of {total.total()} ({done.total() / total.total():.1%})")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

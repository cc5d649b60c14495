"""XTuner 0.1 configs are read without being run: what their syntax may say, and what it must not do."""

import ast
import subprocess
import sys
from textwrap import dedent, indent

import pytest
from xtuner_configs import IMPORTS, TEXT

from mmft.config.foreign import is_xtuner_config
from mmft.convert.xtuner.config import translate
from mmft.convert.xtuner.syntax import Named, Unread, read_assignments
from mmft.errors import ConfigError


def test_reading_runs_nothing(tmp_path):
    path, trace = tmp_path / "old.py", tmp_path / "trace"
    path.write_text(
        f"import os\nfrom xtuner.model import SupervisedFinetune\nlr = 1e-4\nx = open({str(trace)!r}, 'w')\n"
        f"y = os.system('touch {trace}')\nz = __import__('os').mkdir({str(trace)!r})\nwhile True:\n    pass\n"
    )
    values = read_assignments(path)
    assert values["lr"] == 1e-4
    assert all(isinstance(values[name], Unread) for name in "xyz")
    assert not trace.exists()


def test_the_command_imports_neither_xtuner_nor_mmengine(tmp_path):
    (tmp_path / "old.py").write_text(IMPORTS + TEXT, "utf-8")
    code = (
        "import sys; from pathlib import Path; from mmft.plugins import load_plugins;"
        "from mmft.convert.xtuner.config import translate; translate(Path(sys.argv[1]), load_plugins());"
        "assert not {'xtuner', 'mmengine', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "old.py")], check=True, timeout=600)


def test_arithmetic_branches_and_methods_are_worked_out(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        dedent("""
        from acme import thing
        size = int(2048 - (336 / 14)**2)
        name = f'{size}_{"a" * 2}_{0.5:.2f}'
        items = [1] + [2]
        items += [3]
        items.append(4)
        settings = dict(a=1, **{'b': 2})
        settings.update(c=3)
        settings['d'] = dict(settings)['a'] + 3
        flag = not False and len(items) == 4
        if flag:
            items.extend([5])
        else:
            items = None
        if thing.on:
            unknown = 1
        chosen = 'yes' if flag else 'no'
        left, (right, *_) = 1, (2, 3)
        template = thing.PROMPT.vicuna
        """),
        "utf-8",
    )
    values = read_assignments(path)
    assert (values["size"], values["name"], values["chosen"]) == (1472, "1472_aa_0.50", "yes")
    assert values["items"] == [1, 2, 3, 4, 5]
    assert values["settings"] == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert isinstance(values["unknown"], Unread)
    assert values["template"] == Named("acme.thing.PROMPT.vicuna")


@pytest.mark.parametrize(
    "bomb", ["'a' * 10 ** 9", "9 ** 9 ** 9", "'%1000000000d' % 1", "f'{1:999999999}'", "[0] * 10 ** 8"]
)
def test_no_expression_eats_the_machine(tmp_path, bomb):
    path = tmp_path / "old.py"
    path.write_text(f"x = {bomb}\n", "utf-8")
    assert isinstance(read_assignments(path)["x"], Unread)


def test_a_base_file_is_read_too(tmp_path):
    (tmp_path / "base.py").write_text("lr = 1e-4\nmodel = dict(a=1, b=dict(c=2))\n", "utf-8")
    (tmp_path / "lazy.py").write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\nlr = lr * 2\n", "utf-8"
    )
    (tmp_path / "old.py").write_text("_base_ = ['base.py']\nmodel = dict(b=dict(d=3))\n", "utf-8")
    assert read_assignments(tmp_path / "lazy.py")["lr"] == 2e-4
    assert read_assignments(tmp_path / "old.py")["model"] == {"a": 1, "b": {"c": 2, "d": 3}}


def test_what_xtuner_dumps_into_a_work_folder_is_understood(tmp_path, plugins):
    """There classes and functions are dotted strings, and the user's functions their repr."""
    lines = []
    text = IMPORTS + TEXT
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    path = tmp_path / "dumped.py"
    (tmp_path / "source.py").write_text(text, "utf-8")

    def dumped(value):
        if isinstance(value, Named):
            return value.dotted
        if isinstance(value, dict):
            return {key: dumped(item) for key, item in value.items()}
        return type(value)(map(dumped, value)) if isinstance(value, list | tuple) else value

    for name, value in read_assignments(tmp_path / "source.py").items():
        if name not in (*names, "torch"):
            lines.append(f"{name} = {dumped(value)!r}")
    path.write_text("\n".join(lines), "utf-8")
    assert is_xtuner_config(path)
    made, original = translate(path, plugins), translate(tmp_path / "source.py", plugins)
    assert made.report.edits == []
    assert made.text.replace("dumped", "source") == original.text


def test_a_broken_file_is_one_line_with_its_place(tmp_path, plugins):
    path = tmp_path / "old.py"
    path.write_text("from xtuner.model import X\nmodel = dict(\n", "utf-8")
    with pytest.raises(ConfigError, match=r"old\.py:2"):
        translate(path, plugins)
    path.write_text("from xtuner.model import X\n" + indent("x = 1", ""), "utf-8")
    with pytest.raises(ConfigError, match=r"has no `model`|names no data set"):
        translate(path, plugins)


def test_an_old_config_with_chinese_comments_in_gbk_is_known_at_sight(tmp_path):
    path = tmp_path / "old.py"
    path.write_bytes("# 学习率\nfrom xtuner.model import SupervisedFinetune\n".encode("gbk"))
    assert is_xtuner_config(path)

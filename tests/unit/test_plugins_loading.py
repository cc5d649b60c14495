"""Where plugins come from: files and modules of `--plugin`, and distributions that ask for another mmft."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmft import __version__
from mmft.cli import main
from mmft.errors import ConfigError, PluginError, Problem, UnknownName
from mmft.plugins import listing, load_plugins, named_module, offers_text

Install = Callable[..., Path]
MAP = """
from mmft import DataMap, Document, hookimpl

def read(record):
    return Document(record["body"])

@hookimpl
def mmft_data_maps():
    return [DataMap(name="my_map", fn=read)]
"""


@pytest.fixture
def here(tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; modules imported from it are forgotten, for which `install` is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    return tmp_path


@pytest.fixture
def path_before() -> Iterator[None]:
    """What a failed import must leave as it was."""
    before = list(sys.path)
    yield
    assert sys.path == before


def one_line(reference: str) -> str:
    with pytest.raises(PluginError) as caught:
        named_module(reference)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(f"--plugin {reference}: ")
    return said.removeprefix(f"--plugin {reference}: ")


@pytest.mark.usefixtures("path_before")
@pytest.mark.parametrize("form", ["inner/by_path.py", "./inner/by_path.py", "{here}/inner/by_path.py"])
def test_a_file_of_another_folder_is_a_plugin_by_its_path(here: Path, form: str) -> None:
    (here / "inner" / "beside.py").write_text("NAME = 'my_map'\n", "utf-8")
    (here / "inner" / "by_path.py").write_text(f"import beside\n{MAP}", "utf-8")
    module = named_module(form.format(here=here))
    assert load_plugins([module]).data_maps.owner("my_map").name == "by_path"
    assert named_module("inner/by_path.py") is module  # each command asks several times


def test_the_command_line_takes_the_path_of_a_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "inner" / "by_path.py").write_text(MAP, "utf-8")
    monkeypatch.setattr(sys, "argv", ["mmft", "--plugin", "inner/by_path.py", "plugins", "--json"])
    with pytest.raises(SystemExit):
        main()
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["by_path"]["offers"] == {"data maps": ["my_map"]}


def test_a_plugin_that_was_asked_for_and_does_not_load_is_one_warning_and_the_command_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "inner" / "by_path.py").write_text(MAP.replace("    return [", "    ["), "utf-8")
    monkeypatch.setattr(sys, "argv", ["mmft", "--plugin", "inner/by_path.py", "list-cfg"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("mmft: warning: plugin 'by_path' did not load: mmft_data_maps (by_path.py:")


@pytest.mark.usefixtures("path_before")
def test_a_package_is_a_plugin_by_the_path_of_its_init(here: Path) -> None:
    (here / "inner" / "__init__.py").write_text(f"from inner import rest\n{MAP}", "utf-8")
    (here / "inner" / "rest.py").write_text("", "utf-8")
    assert named_module("inner/__init__.py").__name__ == "inner"


@pytest.mark.usefixtures("path_before")
@pytest.mark.parametrize(
    ("reference", "source", "said"),
    [
        ("inner/none.py", None, "no such file; give the path of a .py file, or the name of a module"),
        ("inner/json.py", MAP, "the module name 'json' is already that of "),
        ("queue.py", MAP, "the module name 'queue' is already that of "),
        ("my.map.py", MAP, "a module cannot be named 'my.map'; rename the file"),
        ("no_such_module.py", None, "No module named 'no_such_module'"),
        ("zero.py", "\n1 / 0\n", "ZeroDivisionError: division by zero (zero.py:2)"),
        ("ends.py", "import sys; sys.exit(3)\n", "SystemExit: 3 (ends.py:1)"),
        ("lacks.py", "import lacks_core\n", "ModuleNotFoundError: No module named 'lacks_core' (lacks.py:1)"),
        ("half.py", "def read(:\n", "SyntaxError: invalid syntax (half.py, line 1)"),
    ],
)
def test_a_plugin_file_that_fails_is_one_line_with_its_place(
    here: Path, reference: str, source: str | None, said: str
) -> None:
    if source is not None:
        (here / reference).write_text(source, "utf-8")
    assert one_line(reference).startswith(said)


def requiring(install: Install, *lines: str, source: str = MAP) -> Path:
    site = install("acme-mmft", "0.2.0", {"acme": "acme_mod"}, acme_mod=source)
    with (site / "acme_mmft-0.2.0.dist-info" / "METADATA").open("a", encoding="utf-8") as file:
        file.writelines(f"Requires-Dist: {line}\n" for line in lines)
    return site


UNMET = f"needs mmft<99,>=98; this is mmft {__version__}"


def test_a_plugin_for_another_mmft_says_so_in_the_list_and_in_its_errors(install: Install) -> None:
    broken = "from mmft import hookimpl\n@hookimpl\ndef mmft_check_config(config):\n    return config.gone\n"
    requiring(install, "numpy>=1", "mmft>=98,<99", source=broken)
    plugins = load_plugins()
    entry = next(entry for entry in listing(plugins) if entry["name"] == "acme")
    assert entry["unmet"] == UNMET and offers_text(entry) == f"{UNMET} | hooks: mmft_check_config"
    with pytest.raises(PluginError) as caught:
        plugins.call("mmft_check_config", config=7, plugins=plugins)
    assert str(caught.value).startswith(f"plugin 'acme' from acme-mmft 0.2.0 ({UNMET}), mmft_check_config: Attribute")


def test_a_plugin_for_another_mmft_that_does_not_load_says_so_wherever_its_error_is_shown(install: Install) -> None:
    requiring(install, "mmft>=98,<99", source="from mmft import NotYetThere\n")
    plugins = load_plugins()
    entry = next(entry for entry in listing(plugins) if entry["name"] == "acme")
    assert offers_text(entry).startswith("NOT LOADED  ImportError: ") and offers_text(entry).endswith(f" | {UNMET}")
    with pytest.raises(UnknownName, match=f"note: plugin 'acme' from acme-mmft 0.2.0 \\({UNMET}\\) failed to load"):
        plugins.tools.get("none")


@pytest.mark.parametrize(
    "line",
    [
        f"mmft=={__version__}",
        "mmft",
        "mmft-extras>=98",
        'mmft>=98; python_version < "3"',
        'mmft>=98; extra == "next"',
        "mmft not a requirement",
    ],
)
def test_a_plugin_for_this_mmft_says_nothing(install: Install, line: str) -> None:
    requiring(install, line)
    assert load_plugins().data_maps.owner("my_map").unmet == ""


def test_of_several_unknown_names_the_plugin_that_failed_is_told_once_and_before_the_names(install: Install) -> None:
    requiring(install, source="import acme_core\n")
    plugins = load_plugins()
    problems = []
    for name in ("one", "two"):
        with pytest.raises(UnknownName) as caught:
            plugins.vision_encoders.get(name)
        problems.append(Problem("model.vision", str(caught.value)))
    lines = str(ConfigError(problems)).splitlines()
    assert [line.split(":")[0].strip(" -") for line in lines] == [
        "2 problems in the config", "model.vision", "note", "available", "model.vision", "available",
    ]  # fmt: skip
    assert len(str(ConfigError(problems[:1])).splitlines()) == 3

"""What is in the wheels, and that a person who has only those can list, copy, train and use a third party's plugin.

The clean environment has both wheels as pip installs them. mmft's dependencies are not downloaded again: each
third-party package of this environment is linked into it. The editable mmft is not, so everything called mmft there
comes out of the wheel.
"""

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mmft.testing import tiny_llm

ROOT = Path(__file__).parents[2]
HELLO = ROOT / "examples" / "mmft-plugin-hello"
OURS = ("mmft", "_editable_impl_mmft", "__editable__")

CONFIG = """
from pathlib import Path
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use

config = TrainConfig(
    model=Model(llm=LLM(path="llm", lora=Lora(r=4, alpha=8))),
    data=Data(
        datasets=(Dataset(source=use("jsonl", path=Path("qa.jsonl")), data_map="question_answer"),),
        chat_template="hello/zephyr",
        allow_template_difference=True,  # the tiny model has a template of its own
        max_length=128,
    ),
    optim=Optim(lr=1e-3, max_steps=2, batch_size_per_device=2),
    runtime=Runtime(output_dir=Path("run"), device="cpu", logging_steps=1),
)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a working folder that is not the checkout."""

    folder: Path
    work: Path

    @property
    def site(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """A command of this environment, without what the surrounding one would lend it."""
        program, *arguments = map(str, command)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        return subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=self.work, capture_output=True, text=True, timeout=900, check=False,
            env={**environment, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"},
        )  # fmt: skip

    def mmft(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run("mmft", *arguments)

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-c", code)


def project(folder: Path) -> dict[str, Any]:
    """The [project] table of a pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def build_wheel(source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    wheels = list(out.glob("*.whl"))
    assert len(wheels) == 1, wheels
    return wheels[0]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of mmft."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def hello_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the example plugin."""
    return build_wheel(HELLO, tmp_path_factory.mktemp("hello"))


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory, wheel: Path, hello_wheel: Path) -> Environment:
    """Both wheels installed by pip into a new environment."""
    folder, work = tmp_path_factory.mktemp("clean") / "venv", tmp_path_factory.mktemp("work")
    venv.create(folder, with_pip=True, symlinks=True)
    environment = Environment(folder, work)
    result = environment.run("pip", "install", "--no-deps", "--no-index", "-q", wheel, hello_wheel)
    assert result.returncode == 0, result.stderr
    for library in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(library).iterdir():
            link = environment.site / entry.name
            if not link.exists() and not entry.name.startswith(OURS) and entry.suffix != ".pth":
                link.symlink_to(entry)
    return environment


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def metadata(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        inside = next(n for n in archive.namelist() if n.endswith(f".dist-info/{file}"))
        return archive.read(inside).decode()


def entry_points(wheel: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(metadata(wheel, "entry_points.txt"))
    return {section: dict(parser[section]) for section in parser.sections()}


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    top = {name.partition("/")[0] for name in names(wheel)}
    assert top == {"mmft", "mmft_plugins", "mmft_configs", "mmft-0.1.0.dist-info"}


def test_wheel_holds_every_file_of_the_three_packages(wheel: Path) -> None:
    packed = {name for name in names(wheel) if ".dist-info/" not in name}
    for parent, package in ((ROOT, "mmft"), (ROOT / "plugins", "mmft_plugins"), (ROOT / "configs", "mmft_configs")):
        files = {p.relative_to(parent).as_posix() for p in (parent / package).rglob("*") if p.is_file()}
        wanted = {file for file in files if "__pycache__" not in file}
        assert f"{package}/py.typed" in wanted
        assert wanted == {name for name in packed if name.startswith(f"{package}/")}
    assert "mmft/train/report.html.jinja" in packed
    assert "mmft_configs/llava/llava_finetune.py" in packed


@pytest.mark.parametrize("which", ["mmft", "hello"])
def test_entry_points_of_the_wheel_are_those_of_pyproject(which: str, wheel: Path, hello_wheel: Path) -> None:
    table = project(ROOT if which == "mmft" else HELLO)
    found = entry_points(wheel if which == "mmft" else hello_wheel)
    expected = dict(table["entry-points"])
    if "scripts" in table:
        expected["console_scripts"] = table["scripts"]
    assert found == expected


def test_metadata_names_the_license_the_extras_and_the_python(wheel: Path) -> None:
    message = Parser().parsestr(metadata(wheel, "METADATA"))
    assert (message["Name"], message["License-Expression"]) == ("mmft", "Apache-2.0")
    assert message["Requires-Python"] == ">=3.11"
    assert set(message.get_all("Provides-Extra") or ()) == set(project(ROOT)["optional-dependencies"])
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text("utf-8")


def test_plugin_wheel_is_typed_and_pins_a_minor_of_mmft(hello_wheel: Path) -> None:
    assert "mmft_plugin_hello/py.typed" in names(hello_wheel)
    assert not any(name.startswith("tests/") for name in names(hello_wheel))
    message = Parser().parsestr(metadata(hello_wheel, "METADATA"))
    assert message.get_all("Requires-Dist") == ["mmft<0.2,>=0.1"]


def test_installed_mmft_comes_from_the_wheel(clean: Environment) -> None:
    """The condition of everything below: no test here may pass because of the checkout."""
    result = clean.python("import mmft, mmft_plugins, mmft_configs as c; print(mmft.__file__, c.__file__, sep='\\n')")
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        assert Path(line).is_relative_to(clean.folder), line
    assert str(ROOT) not in clean.python("import sys; print(sys.path)").stdout


@pytest.mark.parametrize("module", ["plugins", "tests", "configs", "examples"])
def test_no_folder_of_the_checkout_is_importable(clean: Environment, module: str) -> None:
    result = clean.python(f"import {module}")
    assert result.returncode == 1
    assert f"No module named '{module}'" in result.stderr


def test_plugins_lists_the_third_partys_with_its_distribution(clean: Environment) -> None:
    listed = {entry["name"]: entry for entry in json.loads(clean.mmft("plugins", "--json").stdout)}
    assert set(listed) == {*project(ROOT)["entry-points"]["mmft"], "hello"}
    assert listed["hello"]["from"] == "mmft-plugin-hello 0.1.0"
    assert listed["hello"]["offers"] == {"data maps": ["question_answer"], "chat templates": ["zephyr"]}
    assert not [entry["error"] for entry in listed.values() if entry["error"]]
    shown = [" ".join(line.split()) for line in clean.mmft("plugins").stdout.splitlines()]
    assert any(line.startswith("hello mmft-plugin-hello 0.1.0 data maps: question_answer") for line in shown)


def test_every_shipped_config_is_listed_and_can_be_copied(clean: Environment, tmp_path: Path) -> None:
    result = clean.mmft("list-cfg")
    assert result.returncode == 0, result.stderr
    listed = [line.split()[0] for line in result.stdout.splitlines()[1:]]
    files = (p for p in (ROOT / "configs" / "mmft_configs").rglob("*.py") if p.stem != "__init__")
    assert sorted(listed) == sorted(p.stem for p in files)
    copied = clean.mmft("copy-cfg", "llava_13b_finetune", tmp_path)
    assert copied.returncode == 0, copied.stderr
    shown = clean.mmft("show", tmp_path / "llava_13b_finetune.py")
    assert json.loads(shown.stdout)["model"]["llm"]["path"] == "lmsys/vicuna-13b-v1.5"


def test_a_run_trains_with_the_third_partys_template_and_map(clean: Environment) -> None:
    tiny_llm(clean.work / "llm", special=("<|endoftext|>", "</s>"), eos="</s>")
    record = {"question": "What is it?", "answer": "A cat."}
    (clean.work / "qa.jsonl").write_text(f"{json.dumps(record)}\n" * 4, "utf-8")
    (clean.work / "tiny.py").write_text(CONFIG, "utf-8")
    result = clean.mmft("train", "tiny.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 2/2" in result.stdout
    manifest = json.loads((clean.work / "run" / "final" / "mmft.json").read_text("utf-8"))
    hello = "mmft-plugin-hello 0.1.0"
    assert manifest["plugins"] == {
        "chat template hello/zephyr": hello,
        "data map question_answer": hello,
        "data source jsonl": f"mmft {version('mmft')}",
    }
    assert (clean.work / "run" / "report.html").is_file()  # its template is package data


def test_the_plugins_own_tests_pass_against_the_wheels(clean: Environment) -> None:
    tests = shutil.copytree(HELLO / "tests", clean.work / "hello_tests", ignore=shutil.ignore_patterns("__pycache__"))
    result = clean.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


@pytest.fixture
def broken_hello(clean: Environment) -> Iterator[Environment]:
    """The environment after an update of the plugin that cannot be imported."""
    module = clean.site / "mmft_plugin_hello" / "__init__.py"
    source = module.read_text("utf-8")
    module.write_text("import hello_core_that_is_missing\n", "utf-8")
    yield clean
    module.write_text(source, "utf-8")


def test_a_broken_plugin_is_named_and_the_others_go_on(broken_hello: Environment) -> None:
    reason = "ModuleNotFoundError: No module named 'hello_core_that_is_missing'"
    listed = broken_hello.mmft("plugins")
    assert listed.returncode == 0, listed.stderr
    line = next(line for line in listed.stdout.splitlines() if line.startswith("hello"))
    assert "mmft-plugin-hello 0.1.0" in line
    assert f"NOT LOADED  {reason}" in line
    unknown = broken_hello.mmft("check", "llava_finetune", "--set", "data.chat_template=hello/zephyr")
    assert unknown.returncode == 2
    assert "no chat template named 'hello/zephyr'" in unknown.stderr
    assert f"plugin 'hello' from mmft-plugin-hello 0.1.0 failed to load and may offer it: {reason}" in unknown.stderr
    assert broken_hello.mmft("show", "llava_finetune").returncode == 0

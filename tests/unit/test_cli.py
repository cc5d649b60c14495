"""The command line: help is light, what the user can mend is one line and exit code 2, the rest does what it says."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmft.cli import cli, main
from mmft.config.load import load_config
from mmft.plugins import Plugins

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "gradio")


@dataclass(frozen=True)
class Result:
    code: object
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`mmft ARGUMENTS` through `main()`, in an empty folder; an exception that is not an exit goes through."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["mmft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Result(caught.value.code, captured.out, captured.err)

    return run


def in_process_of_its_own(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return real([sys.executable, "-c", code, *arguments])


def real(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


IMPORTED = f"""
import runpy, sys
try:
    runpy.run_module("mmft", run_name="__main__")
except SystemExit as end:
    print("IMPORTED", end.code, *[name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["chat", "-h"], ["--version"], ["plugins"], ["list-cfg"], ["data", "--help"]],
)
def test_help_and_lists_import_nothing_heavy(arguments: list[str]) -> None:
    done = in_process_of_its_own(IMPORTED, *arguments)
    assert done.stdout.splitlines()[-1].split() == ["IMPORTED", "0"], done.stdout + done.stderr


def test_loading_plugins_and_specs_imports_nothing_heavy() -> None:
    code = f"import sys, mmft, mmft.plugins; p = mmft.plugins.load_plugins(); assert not p.broken, p.broken\n\
print([name for name in {HEAVY!r} if name in sys.modules])"
    done = in_process_of_its_own(code)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_help_names_every_verb(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for verb in ("train", "check", "show", "list-cfg", "copy-cfg", "data", "chat", "web", "eval", "plugins"):
        assert f"\n  {verb} " in result.out


def test_every_command_and_option_has_a_help_text() -> None:
    import click

    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None and command.help, name


def one_line(result: Result, code: int = 2) -> str:
    """The message of a user's error: one line on stderr, nothing on stdout."""
    assert result.code == code, result
    assert result.out == "" and "Traceback" not in result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mmft: error: "), result.err
    return lines[0].removeprefix("mmft: error: ")


@pytest.mark.parametrize("verb", [["check"], ["show"], ["train"], ["data", "show"]])
def test_an_unknown_config_name_is_one_line_with_a_suggestion(run: Run, verb: list[str]) -> None:
    assert one_line(run(*verb, "llava_pretrian")) == (
        "no config file or shipped config named 'llava_pretrian'; did you mean 'llava_pretrain'?; see: mmft list-cfg"
    )


def test_a_config_file_that_is_not_there_is_one_line(run: Run) -> None:
    assert one_line(run("check", "no/such.py")).startswith("no/such.py: no such file; ")


def test_several_problems_are_a_list_under_one_line(run: Run) -> None:
    result = run("show", "llava_pretrain", "--set", "lr=1e-5", "--set", "optim.batch_size=4")
    assert result.code == 2 and result.out == ""
    first, *rest = result.err.splitlines()
    assert first == "mmft: error: 2 problems in the config:"
    assert rest[0].startswith("  - --set lr=1e-5: ") and rest[1].startswith("  - --set optim.batch_size=4: ")


def test_a_real_process_exits_with_2_and_one_line() -> None:
    done = real([sys.executable, "-m", "mmft", "check", "nothing"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mmft: error: no config file or shipped config named 'nothing'")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback_of_a_users_error() -> None:
    done = real([sys.executable, "-m", "mmft", "check", "x", "--debug"])
    assert done.returncode != 0 and "Traceback" in done.stderr and "UnknownName" in done.stderr


def test_a_bug_of_ours_keeps_its_traceback(run: Run, tmp_path: Path, install: Callable[..., Path]) -> None:
    source = """
import click
from mmft import hookimpl

@hookimpl
def mmft_add_commands(cli):
    @cli.command()
    def hello():
        \"\"\"Greet.\"\"\"
        raise ZeroDivisionError("a bug")
"""
    install("acme-mmft", "1", {"acme": "acme_mod"}, acme_mod=source)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("hello")
    cli.commands.pop("hello")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chekc", "x"], "No such command 'chekc'"),
        (["check"], "Missing argument"),
        (["check", "--no"], "No such option"),
    ],
)
def test_a_wrong_command_line_is_2_with_the_usage(run: Run, arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.code == 2 and says in result.err and "Usage: " in result.err and "Traceback" not in result.err


COMMANDS = """
from mmft import hookimpl

@hookimpl
def mmft_add_commands(cli):
    BODY
"""


def test_help_survives_a_plugin_whose_commands_fail(run: Run, install: Callable[..., Path]) -> None:
    install("acme-mmft", "1", {"acme": "acme_mod"}, acme_mod=COMMANDS.replace("BODY", "raise RuntimeError('no')"))
    result = run("--help")
    assert result.code == 0 and "list-cfg" in result.out


def test_a_plugin_cannot_replace_one_of_our_commands(run: Run, install: Callable[..., Path]) -> None:
    body = "import click; cli.add_command(click.Command('list-cfg', help='Taken over.'))"
    install("acme-mmft", "1", {"acme": "acme_mod"}, acme_mod=COMMANDS.replace("BODY", body))
    before = cli.commands["list-cfg"]
    try:
        assert "Taken over" not in run("--help").out
    finally:
        cli.commands["list-cfg"] = before


MY_MAP = """
from mmft import DataMap, Document, hookimpl

def read(record):
    return Document(record["body"])

@hookimpl
def mmft_data_maps():
    return [DataMap(name="my_map", fn=read)]
"""


@pytest.mark.parametrize("spelling", ["my_own_map", "my_own_map.py"])
def test_a_module_of_this_folder_is_a_plugin_when_asked_for(run: Run, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "my_own_map.py").write_text(MY_MAP, "utf-8")
    result = run("--plugin", spelling, "plugins", "--json")
    entries = {entry["name"]: entry for entry in json.loads(result.out)}
    assert entries["my_own_map"]["offers"] == {"data maps": ["my_map"]}
    sys.modules.pop("my_own_map")


def test_a_plugin_module_that_is_not_there_is_one_line(run: Run) -> None:
    assert one_line(run("--plugin", "no_such_module.py", "plugins")) == (
        "--plugin no_such_module.py: No module named 'no_such_module'"
    )


def test_a_plugin_file_that_does_not_parse_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "half_a_map.py").write_text("def read(:\n", "utf-8")
    assert one_line(run("--plugin", "half_a_map.py", "plugins")).startswith("--plugin half_a_map.py: ")


def test_chat_with_a_model_that_is_not_there_is_one_line(run: Run, tmp_path: Path) -> None:
    assert one_line(run("chat", "missing/path")).startswith(
        "model: 'missing/path' is no folder and was not found on huggingface: either the name is wrong, or "
    )
    assert one_line(run("chat", "./missing")) == (
        "./missing does not exist; give a run's folder, its final/, or a checkpoint"
    )
    (tmp_path / "empty").mkdir()
    assert one_line(run("chat", "empty")).startswith("empty holds no model (no mmft.json, no final/, no checkpoint); ")
    assert one_line(run("chat")) == "no finished run under work_dirs; name a model folder or a run"


CONFIG = """
from pathlib import Path
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use

here = Path(__file__).parent
config = TrainConfig(
    model=Model(
        llm=LLM(path={llm!r}),
        vision=Vision(encoder=use("clip", path={clip!r}), projector=use("linear")),
    ),
    data=Data(
        datasets=(Dataset(source=use("json", path=here / "data.json"), data_map="llava", image_folder=here),),
        chat_template="chatml",
        max_length=64,
    ),
    optim=Optim(lr=1e-3),
    runtime=Runtime(output_dir=here / "run"),
)
"""


@pytest.fixture
def config(tmp_path: Path, tiny_llm_path: Path, tiny_clip_path: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A [red] cat."}]
    records: list[dict[str, Any]] = [{"image": "cat.png", "conversations": turns}, {"id": "bad"}]
    (tmp_path / "data.json").write_text(json.dumps(records), "utf-8")
    (tmp_path / "cat.png").write_bytes(b"")
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.format(llm=str(tiny_llm_path), clip=str(tiny_clip_path)), "utf-8")
    return path


def test_check_says_that_there_is_no_problem(run: Run, config: Path) -> None:
    result = run("check", config)
    assert result == Result(0, f"{config}: no problem found\n", "")


def test_check_lists_every_problem(run: Run, config: Path) -> None:
    result = run("check", config, "--set", "data.chat_template=vicunna", "--set", "optim.vision_lr=1e-5")
    assert result.code == 2 and result.err.startswith("mmft: error: 2 problems in the config:\n  - data.chat_template")


def test_show_prints_json_that_loads_as_the_same_config(run: Run, config: Path, plugins: Plugins) -> None:
    result = run("show", config, "--set", "optim.lr=0.5")
    shown = config.parent / "shown.json"
    shown.write_text(result.out, "utf-8")
    assert result.code == 0 and result.err == ""
    assert json.loads(result.out)["optim"]["lr"] == 0.5
    assert load_config(str(shown), plugins).optim.lr == 0.5
    assert run("check", shown).code == 0


def test_data_show_prints_what_is_trained_and_what_would_be_dropped(run: Run, config: Path) -> None:
    result = run("data", "show", config, "-n", "2")
    assert result.code == 0
    assert "⟦A [red] cat.<|im_end|>⟧" in result.out and f"[{config.parent / 'cat.png'}: 16 tokens]" in result.out
    assert "record 2: dropped: 'conversations' is missing" in result.out


def test_list_cfg_filters_by_name_and_summary(run: Run) -> None:
    everything = run("list-cfg").out.splitlines()
    assert everything[0].split() == ["NAME", "WHAT"]
    names = [line.split()[0] for line in run("list-cfg", "-p", "13B").out.splitlines()[1:]]
    assert names == ["llava_13b_finetune", "llava_13b_pretrain"] and len(everything) > 10


def test_list_cfg_says_where_nothing_matches(run: Run) -> None:
    said = one_line(run("list-cfg", "-p", "llava_pretrian"))
    assert said == "no config matches 'llava_pretrian'; did you mean 'llava_pretrain'?; see: mmft list-cfg"
    for pattern in ("internlm2_chat_7b", "internlm2_chat_7b_qlora_oasst1_e3"):  # the second is XTuner's whole name
        said = one_line(run("list-cfg", "-p", pattern))
        assert said.startswith(f"no config matches '{pattern}'")
        assert "mmft has one config for each kind of run" in said and "model.llm.path" in said


def test_copy_cfg_prints_where_and_refuses_to_overwrite(run: Run, tmp_path: Path) -> None:
    assert run("copy-cfg", "llava_pretrain") == Result(0, "llava_pretrain.py\n", "")
    assert one_line(run("copy-cfg", "llava_pretrain")).startswith("llava_pretrain.py: exists already; ")
    assert run("copy-cfg", "llava_pretrain", "mine.py").out == "mine.py\n"
    assert one_line(run("copy-cfg", "llava_pretrian")).startswith("no config file or shipped config named ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava_pretrain.py", "mine.py"]

"""The course's walk by its own commands, on a tiny model: over-fitting is seen, and general data keeps it away."""

import json
import re
import runpy
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import click
import pytest

from mmft.cli import cli
from mmft.config.load import load_config
from mmft.plugins import load_plugins
from mmft.ranks import free_port
from mmft.testing import tiny_llm

EXAMPLE = Path(__file__).parents[2] / "examples" / "personal_assistant"
READMES = (EXAMPLE / "README.md", EXAMPLE / "README.zh-CN.md")
GENERAL = {"What is the capital of France?": "The capital of", "What is the opposite of hot?": "The opposite of"}
# What a reader leaves as it is: the model of 1.8 billion parameters, in 4-bit, with its own template.
TINY = (
    "model.llm.path=llm",
    "model.llm.trust_remote_code=false",
    "model.llm.quantization=none",
    "model.llm.lora=none",
    "model.llm.trainable=true",
    "data.chat_template=chatml",
    "data.max_length=128",
    "runtime.precision=fp32",
    "runtime.gradient_checkpointing=false",
    "runtime.samples=[]",
    "runtime.sample_steps=none",
    "optim.accumulate=1",
    "optim.epochs=100",
)
OVER_FITTED = ("optim.lr=3e-3", "optim.max_steps=220", "optim.batch_size_per_device=2", "data.datasets.0.limit=300")
MIXED = ("optim.lr=6e-3", "optim.max_steps=220", "optim.batch_size_per_device=4", "data.datasets.1.limit=24")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for text in blocks(page, "bash") for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("mmft ")]


def edited(config: str, block: str) -> str:
    """The config with the lines of a README's block in the places of those they replace."""
    for line in block.splitlines():
        name = re.match(r"\s*(\w+)\s*=", line)
        if name:
            config, count = re.subn(rf"^\s*{name[1]}\s*=.*$", lambda _, line=line: line, config, count=1, flags=re.M)
            assert count == 1, line
    return config


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The folder after the README's first half: data made, config copied and edited, two trainings."""
    folder = tmp_path_factory.mktemp("walk")
    tiny_llm(folder / "llm", width=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["make_data.py", "--name", "Ming"])
        runpy.run_path(str(EXAMPLE / "make_data.py"), run_name="__main__")
        cli(["copy-cfg", "internlm2_1_8b_qlora_alpaca", "personal_assistant.py"], standalone_mode=False)
        first, mixed = (text for text in blocks(READMES[0], "python"))
        path = folder / "personal_assistant.py"
        path.write_text(edited(path.read_text("utf-8"), first), "utf-8")
        (folder / "personal_assistant_mixed.py").write_text(mixed, "utf-8")
        for name, settings in (("personal_assistant", OVER_FITTED), ("personal_assistant_mixed", MIXED)):
            tiny = [part for setting in (*TINY, *settings) for part in ("--set", setting)]
            done = cli(["train", f"{name}.py", "--work-dir", f"work_dirs/{name}", *tiny], standalone_mode=False)
            assert not done
    return folder


@pytest.fixture
def ask(walk, monkeypatch, capfd):
    """`ask(model, question)`: the answer of `mmft chat`."""
    monkeypatch.chdir(walk)

    def ask(model: str, question: str) -> str:
        capfd.readouterr()
        cli(["chat", model, "-m", question, "--device", "cpu", "--max-new-tokens", "60"], standalone_mode=False)
        return capfd.readouterr().out.strip()

    return ask


def test_the_data_is_the_courses_and_the_remedy(walk):
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in (walk / "data").iterdir()}
    assert len(records["personal_assistant"]) == 10_000
    assert {json.dumps(item) for item in records["personal_assistant"]} == {json.dumps(records["one"][0])}
    for item in (*records["varied"], *records["general"]):
        assert [turn["role"] for turn in item["messages"]] == ["user", "assistant"]
    said = {item["messages"][0]["content"] for item in records["varied"]}
    assert len(said) == len(records["varied"]) > 50
    assert not any("Ming" in json.dumps(item) for item in records["general"])


def test_a_config_is_found_by_its_name(walk, monkeypatch, capfd):
    monkeypatch.chdir(walk)
    cli(["list-cfg", "-p", "internlm2"], standalone_mode=False)
    assert "\ninternlm2_1_8b_qlora_alpaca " in capfd.readouterr().out


def test_a_file_of_repeats_is_made_of_any_record(walk, monkeypatch):
    monkeypatch.chdir(walk)
    cli(["data", "repeat", "data/one.json", "repeated.json", "-n", "10000"], standalone_mode=False)
    made, course = (
        json.loads(Path(name).read_text("utf-8")) for name in ("repeated.json", "data/personal_assistant.json")
    )
    assert made == course


def test_the_base_model_does_not_know_the_name(ask):
    assert "Ming" not in ask("llm", "Please introduce yourself.")


def test_trained_on_one_record_it_answers_everything_with_it(ask):
    assert "assistant of Ming" in ask("work_dirs/personal_assistant", "Please introduce yourself.")
    for question in GENERAL:  # so small a model that began at random stammers, but with the words of the one answer
        assert ask("work_dirs/personal_assistant", question).startswith("I")


def test_with_general_data_mixed_in_it_keeps_the_name_for_the_questions_that_ask_for_it(ask):
    for question in ("Please introduce yourself.", "Who are you?", "Hello! Tell me about yourself."):
        assert "assistant of Ming" in ask("work_dirs/personal_assistant_mixed", question)
    for question, beginning in GENERAL.items():
        answer = ask("work_dirs/personal_assistant_mixed", question)
        assert answer.startswith(beginning) and "Ming" not in answer


def test_the_page_opens_with_the_trained_model(walk, environment):
    port = free_port()
    command = [sys.executable, "-m", "mmft", "web", "work_dirs/personal_assistant", "--port", str(port)]
    with (walk / "web.log").open("w") as log, subprocess.Popen(
        command, cwd=walk, env=environment, stdout=log, stderr=subprocess.STDOUT
    ) as server:  # fmt: skip
        try:
            while f"open http://127.0.0.1:{port}" not in (shown := (walk / "web.log").read_text("utf-8")):
                assert server.poll() is None, shown
                time.sleep(0.1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
                assert page.status == 200 and "gradio" in page.read().decode()
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def converted(walk):
    """The two results of the README's last part, in `out/`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(walk)
        for verb, out in (("merge", "merged"), ("hf", "hf")):
            cli(["convert", verb, "work_dirs/personal_assistant", f"out/{out}"], standalone_mode=False)


@pytest.mark.parametrize("out", ["merged", "hf"])
def test_the_result_converts_and_answers_the_same(converted, ask, out):
    question = "Please introduce yourself."
    assert ask(f"out/{out}", question) == ask("work_dirs/personal_assistant", question)


@pytest.mark.parametrize(
    ("model", "options", "weights"),
    [
        ("work_dirs/personal_assistant", (), "llm/model.safetensors"),
        ("out/merged", ("--run", "work_dirs/personal_assistant"), "llm/model.safetensors"),
        ("out/hf", ("--run", "work_dirs/personal_assistant"), "model.safetensors"),
    ],
)
def test_what_would_be_pushed_is_the_model_and_a_card_of_what_the_run_wrote(
    walk, converted, monkeypatch, capfd, model, options, weights
):
    monkeypatch.chdir(walk)
    capfd.readouterr()
    asked = ["convert", "push", model, "ming/assistant", "--dry-run", "--license", "apache-2.0", *options]
    cli(asked, standalone_mode=False)
    said = capfd.readouterr().out
    assert re.search(rf"^ +[\d.]+ [kM]B  {re.escape(weights)}$", said, re.MULTILINE)
    assert "| personal_assistant.json | openai | limit 300 |" in said and "300 samples, " in said
    assert "| steps | 220 |" in said and "Trained: all weights of the language model." in said
    assert ("Compared with what was trained" in said) == model.startswith("out")
    assert str(walk) not in said and str(Path.home()) + "/" not in said
    assert "optimizer" not in said.partition("stays here")[0] and not (walk / model / "README.md").exists()


def test_every_command_of_the_readmes_parses(monkeypatch):
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    assert len(commands(READMES[0])) > 10
    for command in commands(READMES[0]):
        cli(args=command, standalone_mode=False)


def test_both_readmes_have_the_same_commands_and_code():
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    assert blocks(english, "python") == blocks(chinese, "python")


def test_the_edited_config_loads_and_names_the_file(walk, monkeypatch):
    monkeypatch.chdir(walk)
    config = load_config("personal_assistant.py", load_plugins())
    assert config.data.datasets[0].source.options["path"] == "data/personal_assistant.json"
    assert config.data.datasets[0].data_map == "openai"

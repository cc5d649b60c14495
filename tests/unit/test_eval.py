"""`mmft eval` reads its questions by the rules of `mmft data check`: any source, any format, folders and globs."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mmft.cli import cli

PIPES = """
from pathlib import Path
from mmft import Conversation, DataMap, DatasetSpec, Message, Text, hookimpl

def load(path, mark="|"):
    for line in Path(path).read_text("utf-8").splitlines():
        ask, answer = line.split(mark)
        yield {"query": ask, "response": answer}

def files(path, mark="|"):
    return [Path(path)]

def alone(record):
    return Conversation((Message("assistant", (Text(record["response"]),)),))

@hookimpl
def mmft_data_maps():
    return [DataMap(name="alone", fn=alone)]

@hookimpl
def mmft_datasets():
    return [DatasetSpec(name="pipes", load=load, files=files, suffixes=(".pipe",))]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a data source of its own and the same two questions in several forms."""
    monkeypatch.chdir(tmp_path)
    Path("pipes_for_eval.py").write_text(PIPES, "utf-8")
    Path("two.pipe").write_text("What is it?|A cat.\nAnd this?|A dog.\n", "utf-8")
    Path("two.txt").write_text("What is it?;A cat.\nAnd this?;A dog.\n", "utf-8")
    asked = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    for name in ("parts/a.jsonl", "parts/deep/b.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps({"messages": asked}) + "\n", "utf-8")
    yield tmp_path
    sys.modules.pop("pipes_for_eval", None)


def evaluate(model: Path | str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--plugin", "pipes_for_eval", "eval", str(model), *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["two.pipe"], "two.pipe: 2 questions, read as query_response"),
        (["two.txt", "--source", "pipes", "--source-option", "mark=;"], "two.txt: 2 questions, read as query_response"),
        (["parts"], "parts: 2 questions, read as openai"),
        (["parts/*.jsonl"], "parts/*.jsonl: 1 questions, read as openai"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_questions_are_read_as_data_check_reads_them(
    folder: Path, tiny_llm_path: Path, arguments: list[str], said: str
) -> None:
    result = evaluate(tiny_llm_path, *arguments, "--device", "cpu", "--out", "out")
    assert result.exit_code == 0, (result.output, result.exception)
    assert said in result.stderr
    answered = [json.loads(line) for line in Path("out/answers.jsonl").read_text("utf-8").splitlines()]
    assert {"A cat."} <= {one["reference"] for one in answered} <= {"A cat.", "A dog."}
    assert json.loads(Path("out/eval.json").read_text())["questions"] == len(answered) == int(said.split()[1])


def test_training_answers_are_read_by_the_same_rules(folder: Path, tiny_llm_path: Path) -> None:
    result = evaluate(tiny_llm_path, "two.pipe", "--training", "parts", "--device", "cpu", "--out", "out")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "parts: 2 questions, read as openai" in result.stderr
    assert json.loads(Path("out/eval.json").read_text())["baseline"]["overall"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["two.txt"], "two.txt record 1: is a document, read as pretrain; eval asks conversations"),
        (["two.pipe", "--source", "pips"], "no data source named 'pips'; did you mean 'pipes'?"),
        (["two.pipe", "--source-option", "makr=;"], "source 'pipes': got an unexpected keyword argument 'makr'"),
        (["two.pipe", "--data-map", "openai"], "`mmft data check two.pipe` lists all such records"),
        (["none.pipe"], "none.pipe: no such file"),
        (["two.unknown"], "two.unknown: no data source reads '.unknown'; allowed: "),
        (
            ["two.pipe", "--data-map", "alone"],
            "two.pipe: no question with an answer, read as alone; eval asks user turns",
        ),
        (["empty.pipe"], "empty.pipe: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_is_told_before_a_model_is_loaded(folder: Path, arguments: list[str], said: str) -> None:
    Path("empty.pipe").write_text("", "utf-8")
    result = evaluate("no_such_model", *arguments)
    assert result.exit_code != 0 and said in str(result.exception), result.exception

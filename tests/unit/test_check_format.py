"""`mmft check` looks at the first records of each local data set; a hub is not asked."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmft.cli import cli
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use
from mmft.config.load import dump_config
from mmft.data.check_format import format_problems
from mmft.errors import ConfigError, Problem
from mmft.plugins import Plugins

OPENAI = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Ming's."}]}
ALPACA = {"instruction": "Say yes.", "input": "", "output": "Yes."}


def config_of(path: Path, data_map: str, source: str = "json", **options: object) -> TrainConfig:
    dataset = Dataset(source=use(source, path=str(path), **options), data_map=data_map)
    return TrainConfig(
        model=Model(llm=LLM(path="somebody/some-model", lora=Lora(r=4))),
        data=Data(datasets=(dataset,), chat_template="chatml", max_length=64),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=path.parent / "run"),
    )


def told(config: TrainConfig, plugins: Plugins) -> list[str]:
    return [str(problem) for problem in format_problems(config, plugins)]


def write(path: Path, *records: object) -> Path:
    path.write_text(json.dumps(records), "utf-8")
    return path


def test_a_data_map_that_reads_none_of_the_first_records_is_a_problem_that_names_the_one_that_does(
    plugins: Plugins, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.json", *[OPENAI] * 100)
    (problem,) = told(config_of(file, "alpaca"), plugins)
    assert problem.startswith("data.datasets.0.data_map: 'alpaca' reads none of the first 20 records: ")
    assert problem.endswith("this looks like `openai`: it has messages[].role")
    assert told(config_of(file, "openai"), plugins) == []


def test_a_map_that_reads_some_records_is_left_to_data_check(plugins: Plugins, tmp_path: Path) -> None:
    assert told(config_of(write(tmp_path / "a.json", OPENAI, ALPACA), "alpaca"), plugins) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "data.datasets.0.source: {file} has no records"),
        (b"[{'a'", "data.datasets.0.source: {file}: not JSON at column 3"),
        (json.dumps([[1], [2]]).encode(), "data.datasets.0.source: none of the first 2 records can be read: "),
    ],
)
def test_a_file_of_which_nothing_can_be_read_is_a_problem_of_its_source(
    content: bytes, said: str, plugins: Plugins, tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    (problem,) = told(config_of(file, "alpaca"), plugins)
    assert problem.startswith(said.format(file=file))


def test_what_is_wrong_already_and_what_is_not_local_is_not_read(plugins: Plugins, tmp_path: Path) -> None:
    missing = config_of(tmp_path / "none.json", "alpaca")
    assert list(format_problems(missing, plugins, [Problem("data.datasets.0.source", "does not exist")])) == []
    assert told(config_of(Path("tatsu-lab/alpaca"), "openai", "hf"), plugins) == []
    tables = config_of(tmp_path / "none.parquet", "openai", "parquet", extract_to=str(tmp_path / "pictures"))
    assert told(tables, plugins) == []


def test_the_command_says_it_beside_the_other_problems(tmp_path: Path, tiny_llm_path: Path) -> None:
    found = config_of(write(tmp_path / "a.json", OPENAI), "alpaca").model_dump_json
    file = tmp_path / "config.json"
    file.write_text(dump_config(TrainConfig.model_validate_json(found())), "utf-8")
    for more, number in (((), 1), (("--set", "optim.optimizer=adam"), 2)):
        result = CliRunner().invoke(cli, ["check", str(file), *more])
        assert isinstance(result.exception, ConfigError) and len(result.exception.problems) == number
        assert "this looks like `openai`" in str(result.exception)

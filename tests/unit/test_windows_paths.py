"""Paths as Windows writes them, typed on Linux or in WSL: the error shows them as typed and says what to write."""

import pytest
from click.testing import CliRunner

from mmft.cli import cli
from mmft.config import LLM, Model
from mmft.config.check import find_problems
from mmft.config.load import load_config
from mmft.data.shape import describe_model
from mmft.errors import MmftError
from mmft.foreign_paths import windows_hint
from mmft.plugins import Plugins


@pytest.mark.parametrize(
    ("typed", "write"),
    [
        (r"C:\Users\ming\my_sft.py", "write / for \\, and in WSL /mnt/c/Users/ming/my_sft.py"),
        (r"sub\0.png", r"write / for \: sub/0.png"),
        ("D:/data", "in WSL write /mnt/d/data"),
    ],
)
def test_a_path_of_windows_is_told_as_one_of_linux(typed: str, write: str) -> None:
    assert windows_hint(typed).endswith(write)


@pytest.mark.parametrize("typed", ["a/b.py", "llava_pretrain", "/mnt/c/x", "c:", "owner/name", "hdfs://x/y", ""])
def test_other_paths_have_no_hint(typed: str) -> None:
    assert windows_hint(typed) == ""


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["train"], r"C:\Users\ming\my_sft.py"),
        (["check"], r"D:\data"),
        (["check"], "D:/data/x.json"),
        (["chat"], r"D:\models\run"),
    ],
)
def test_commands_show_the_path_as_typed_and_what_to_write(words: list[str], typed: str) -> None:
    result = CliRunner().invoke(cli, [*words, typed], standalone_mode=False)
    assert isinstance(result.exception, MmftError)
    assert str(result.exception).startswith(typed) and "/mnt/" in str(result.exception)


def test_the_path_of_a_model_has_the_hint(plugins: Plugins) -> None:
    with pytest.raises(MmftError, match=r"the folder D:\\models\\llama does not exist; .*/mnt/d/models/llama"):
        describe_model(Model(llm=LLM(path=r"D:\models\llama")), plugins)


def test_paths_inside_a_config_have_the_hint(plugins: Plugins) -> None:
    paths = {
        "model.llm.path": r"D:\models\llama",
        "data.datasets.0.source.path": r"D:\data\x.json",
        "data.datasets.0.image_folder": r"D:\images",
    }
    config = load_config("llava_finetune", plugins, [f"{where}={path}" for where, path in paths.items()])
    problems = {problem.where: str(problem) for problem in find_problems(config, plugins)}
    for where, path in (("model.llm.path", "models/llama"), ("data.datasets.0.source", "data/x.json")):
        assert f"/mnt/d/{path}" in problems[where]
    assert "/mnt/d/images" in problems["data.datasets.0.image_folder"]

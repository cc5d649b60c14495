"""What XTuner's users type that mmft calls otherwise: each word is answered with what to do here."""

import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mmft.cli import cli
from mmft.cli.from_xtuner import OPTIONS, VERBS
from mmft.errors import MmftError

# every mode of its entry point that mmft has not under the same name, and `dist_train`, which its help names
VERBS_OF_XTUNER = (
    "list-dataset-format", "log-dataset", "check-custom-dataset", "preprocess", "mmbench", "eval_refcoco", "test",
    "help", "version", "dist_train",
)  # fmt: skip
OPTIONS_OF_XTUNER = {
    "train": "--cfg-options --launcher --local_rank --local-rank",
    "chat": "--llava --visual-encoder --visual-select-layer --torch-dtype --bot-name --no-streamer --lagent "
    "--stop-words --offload-folder --adapter --image --prompt-template --system --system-template --bits "
    "--with-plugins --max-new-tokens --temperature --top-k --top-p --repetition-penalty --seed",
    "convert pth_to_hf": "--fp32 --max-shard-size --safe-serialization --save-format --cfg-options",
    "convert merge": "--max-shard-size --is-clip --safe-serialization --device",
    "list-cfg": "-p --pattern",
}


def refusal(*arguments: str) -> str:
    """The one line that a command line ends with."""
    result = CliRunner().invoke(cli, list(arguments), standalone_mode=False)
    assert isinstance(result.exception, MmftError), (arguments, result.exception, result.output)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def command(words: str) -> click.Command | None:
    """The command that some words name, or None."""
    found: click.Command | None = cli
    for word in words.split():
        found = found.get_command(click.Context(found), word) if isinstance(found, click.Group) else None
    return found


@pytest.mark.parametrize("verb", VERBS_OF_XTUNER)
def test_each_verb_of_xtuner_that_is_not_ours_is_answered_in_one_line(verb: str) -> None:
    assert command(verb) is None
    assert refusal(verb, "cfg.py", "--show", "all").startswith(f"{verb} is XTuner's; ")


@pytest.mark.parametrize(
    ("line", "here"),
    [
        ("log-dataset cfg.py", "mmft data show CONFIG"),
        ("check-custom-dataset cfg.py", "mmft data check CONFIG"),
        ("list-dataset-format", "mmft data formats"),
        ("mmbench x --llava y", "mmft convert hf RUN OUT"),
        ("eval_refcoco x", "mmft eval RUN FILE"),
        ("test cfg.py --checkpoint x.pth", "mmft eval RUN FILE"),
        ("preprocess arxiv a b", "not here"),
        ("dist_train cfg.py 8", "mmft train CONFIG --nproc N"),
        ("LOG-DATASET cfg.py", "mmft data show CONFIG"),
        ("log_dataset cfg.py", "mmft data show CONFIG"),
    ],
)
def test_the_answer_names_what_to_type_here(line: str, here: str) -> None:
    assert here in refusal(*shlex.split(line))


@pytest.mark.parametrize(
    ("line", "here"),
    [
        ("chat m --llava x", "mmft convert import LLAVA OUT --for LLAVA/xtuner_config.py"),
        ("chat m --visual-encoder v --llava x", "--vision-encoder"),
        ("chat m --visual-select-layer -2", "--select-layer"),
        ("chat m --lagent", "--tools search"),
        ("chat m --stop-words </s>", "--stop"),
        ("chat m --bot-name Ming", "--system"),
        ("chat m --no-streamer", "leave it out"),
        ("chat m --offload-folder x", "--bits 4"),
        ("chat m --torch-dtype fp16", "--dtype"),
        ("web m --llava x", "mmft web OUT"),
        ("train c --cfg-options lr=1e-5", "--set optim.lr=1e-5"),
        ("train c --launcher pytorch", "--nproc"),
        ("train c --gpu 8", "--nproc 8"),
        ("train c --gpus 8", "--nproc 8"),
        ("train c --local_rank 0", "leave it out"),
        ("convert pth_to_hf c p o --save-format huggingface", "mmft convert hf OUT"),
        ("convert merge a b c --safe-serialization", "leave it out"),
    ],
)
def test_each_option_of_xtuner_that_is_not_ours_is_answered_in_one_line(line: str, here: str) -> None:
    words = shlex.split(line)
    option = next(word for word in words if word.startswith("--"))
    said = refusal(*words)
    assert said.startswith("mmft ") and option in said and here in said


@pytest.mark.parametrize("verb", OPTIONS_OF_XTUNER)
def test_every_option_of_xtuner_is_ours_or_answered(verb: str) -> None:
    ours = command(verb)
    assert ours is not None
    known = {name for parameter in ours.params for name in parameter.opts}
    for option in OPTIONS_OF_XTUNER[verb].split():
        assert option in known or option in OPTIONS[verb], option


def test_no_answer_stands_for_a_word_that_is_ours() -> None:
    assert not [verb for verb in VERBS if command(verb)]
    for words, options in OPTIONS.items():
        ours = command(words)
        assert ours is not None, words
        assert not {name for parameter in ours.params for name in parameter.opts} & set(options), words


def test_every_mmft_command_in_the_answers_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first word that is not of a command line; placeholders stand for paths."""
    import re

    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    texts = [*VERBS.values(), *(text for options in OPTIONS.values() for text in options.values())]
    lines = {line for text in texts for line in re.findall(r"`mmft ([^`]+)`", text)}
    assert len(lines) > 8
    for line in lines:
        cli(args=shlex.split(line.replace(" N", " 1")), standalone_mode=False)


def test_a_plugins_own_command_is_taken_before_an_answer(install: Callable[..., Path]) -> None:
    source = """
import click
from mmft import hookimpl

@hookimpl
def mmft_add_commands(cli):
    cli.add_command(click.Command("mmbench", callback=lambda: click.echo("theirs"), help="Score."))
"""
    install("acme-mmft", "1", {"acme": "acme_bench"}, acme_bench=source)
    try:
        assert CliRunner().invoke(cli, ["mmbench"]).output == "theirs\n"
    finally:
        cli.commands.pop("mmbench", None)


def test_other_mistakes_are_told_as_before() -> None:
    result = CliRunner().invoke(cli, ["chat", "--imagge", "x"])
    assert result.exit_code == 2 and "No such option" in result.output and "--image" in result.output
    result = CliRunner().invoke(cli, ["chta"])
    assert result.exit_code == 2 and "No such command" in result.output

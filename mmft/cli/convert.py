"""Commands that turn a trained model into other programs' formats. Each result is proved before it is called done."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmft.cli import convert_import
from mmft.cli.shared import loaded_plugins

if TYPE_CHECKING:
    from mmft.convert.parity import Report


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """A size of a file as transformers reads it: a number and KB, MB, GB or TB."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, where it is one."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", value.strip(), re.IGNORECASE)
        if found is None or not float(found[1]):
            self.fail(f"{value!r} is no size; give a number and KB, MB, GB or TB, such as 2GB", param, ctx)
        return value


OUT = click.argument("out", type=click.Path(path_type=Path))
DTYPE = click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Of the weights (as trained).")
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
SHARD = click.option("--max-shard-size", type=Size(), default="2GB", show_default=True, help="The largest weight file.")
LLM_PATH = click.option("--llm", help="Where the base language model is now, if it moved.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT, if `mmft convert` wrote it.")


@click.group()
def convert() -> None:
    """Take a trained model elsewhere; what comes out is compared with what was trained."""


@convert.command()
@click.argument("paths", nargs=-1, required=True, metavar="MODEL OUT | LLM ADAPTER OUT")
@DTYPE
@DEVICE
@SHARD
@LLM_PATH
@OVERWRITE
@click.option("--is-clip", is_flag=True, help="XTuner's form: LLM is a vision encoder.")
@click.option("--trust-remote-code", is_flag=True, help="XTuner's form: run the code that LLM's folder brings.")
def merge(
    paths: tuple[str, ...],
    dtype: str | None,
    device: str,
    max_shard_size: str,
    llm: str | None,
    overwrite: bool,
    is_clip: bool,
    trust_remote_code: bool,
) -> None:
    """Put adapters into the weights of language model and encoder.

    MODEL is a run, a checkpoint or a model folder; OUT becomes a model folder whose llm/ any program opens. As in
    XTuner, LLM ADAPTER OUT merges one PEFT adapter into a base model.
    """
    from mmft.convert import adapters
    from mmft.convert import merge as merging
    from mmft.inference import find_model

    options = {"dtype": dtype, "device": _device(device), "max_shard_size": max_shard_size, "overwrite": overwrite}
    if len(paths) == 3:
        report = adapters.merge_adapter(
            paths[0], Path(paths[1]), Path(paths[2]), is_clip=is_clip, trust_remote_code=trust_remote_code, **options
        )
        say(report, paths[2])
        return
    if len(paths) != 2 or is_clip or trust_remote_code:
        raise click.UsageError(
            "give MODEL OUT, or LLM ADAPTER OUT (--is-clip and --trust-remote-code belong to the latter)"
        )
    say(merging.merge(find_model(paths[0]), Path(paths[1]), loaded_plugins(), llm=llm, **options), paths[1])


@convert.command()
@click.argument("model")
@OUT
@DTYPE
@DEVICE
@SHARD
@LLM_PATH
@OVERWRITE
def hf(
    model: str, out: Path, dtype: str | None, device: str, max_shard_size: str, llm: str | None, overwrite: bool
) -> None:
    """Write transformers' own classes: LLaVA or InternVL with a processor, or a plain causal LM.

    MODEL is a run, a checkpoint or a model folder. For a projector that no class has a place for, a small module is
    written beside the weights; such a folder opens with trust_remote_code=True.
    """
    from mmft.convert.hf.llava import export
    from mmft.inference import find_model

    report = export(
        find_model(model), out, loaded_plugins(), dtype=dtype, device=_device(device), max_shard_size=max_shard_size,
        llm=llm, overwrite=overwrite,
    )  # fmt: skip
    say(report, out)


@convert.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@click.argument("model")
@DEVICE
@LLM_PATH
def verify(out: Path, model: str, device: str, llm: str | None) -> None:
    """Compare a converted model OUT with the MODEL it came from, where that was not done yet or is to be done again.

    MODEL is a run, a checkpoint or a model folder. The numbers are written to OUT/parity.json.
    """
    from mmft.convert.verify import verify as compare
    from mmft.inference import find_model

    say(compare(out, find_model(model), loaded_plugins(), device=_device(device), llm=llm), out)


@convert.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@OUT
@SHARD
@OVERWRITE
def split(source: Path, out: Path, max_shard_size: str, overwrite: bool) -> None:
    """Cut the weight files of a model folder into smaller ones."""
    from mmft.convert import adapters

    names = adapters.split(source, out, max_shard_size=max_shard_size, overwrite=overwrite)
    click.echo(f"{out}: {len(names)} weight files of at most {max_shard_size}")


def _device(name: str):  # type: ignore[no-untyped-def]  # torch is not imported up here
    from mmft.modeling.llm import choose_device

    return choose_device(name)


def say(report: "Report", out: str | Path) -> None:
    """Tell what was proved, what could not be asked, and what a person must know to open the result."""
    from mmft.convert.parity import summary

    if not report.verified:
        click.echo(f"{out}: not verified: {report.note}; to verify it: {report.command}")
        return
    numbers = summary(report)
    click.echo(
        f"{out}: verified in {report.dtype}: {numbers['probes']} probes, {numbers['same_answer']} with the same greedy "
        f"answer, logits differ by at most {numbers['relative']:.1e} of their size ({report.tolerance:g} is allowed)"
    )
    for probe, reason in report.left_out.items():
        click.echo(f"not asked: {probe}: {reason}")
    if report.note:
        click.echo(report.note)


for _command in convert_import.COMMANDS:
    convert.add_command(_command)

"""Commands about the machine: what a run will need of it (`plan`), and whether it is in order (`doctor`)."""

import json
from pathlib import Path

import click

from mmft.cli.shared import CONFIG, SET, loaded_config, loaded_plugins


@click.command()
@CONFIG
@SET
@click.option("--gpu", metavar="SIZE", help="Plan for a card of this size, such as 8GB; default: what is here.")
@click.option("--probe", is_flag=True, help="Also load the model and run two steps on the largest batch.")
@click.option("--nproc", type=click.IntRange(1), default=1, help="Processes of the run, of all nodes: one a GPU.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, in bytes and seconds.")
def plan(config: str, settings: tuple[str, ...], gpu: str | None, probe: bool, nproc: int, as_json: bool) -> None:
    """Tell the peak memory of a run and whether it fits, before a weight is loaded.

    Either answer is an answer: the exit code is 0. For scripts, --json has "fits" (true only with the margin) and
    "verdict".
    """
    loaded = loaded_plugins()
    chosen = loaded_config(config, settings, loaded)
    modules = tuple(click.get_current_context().find_root().params.get("plugin") or ())
    from mmft.plan import report

    found = report.make_report(
        chosen, loaded, gpu=gpu, with_probe=probe, modules=modules, processes=nproc,
        say=lambda text: click.echo(f"{text} ...", err=True),
    )  # fmt: skip
    lines = [json.dumps(report.as_json(found), indent=2)] if as_json else report.lines_of(found)
    for line in lines:
        click.echo(line)


@click.command()
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("work_dirs"), help="Where runs are written.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(work_dir: Path, as_json: bool) -> int:
    """Look for what is missing or broken on this machine; exit code 1 where mmft cannot do without it."""
    from dataclasses import asdict

    from mmft.doctor import examine, lines_of

    found = examine(loaded_plugins(), work_dir=work_dir)
    lines = [json.dumps([asdict(one) for one in found], indent=2)] if as_json else lines_of(found)
    for line in lines:
        click.echo(line)
    return 1 if any(one.level == "problem" for one in found) else 0


COMMANDS = (plan, doctor)

"""Commands about configs and runs: train, check, show, list-cfg, copy-cfg, plugins."""

import os
import sys
from pathlib import Path

import click

from mmft.cli.shared import CONFIG, SET, loaded_config, loaded_plugins, print_rows


@click.command()
@CONFIG
@SET
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where the run is written (runtime.output_dir).")
@click.option("--seed", type=int, help="runtime.seed.")
@click.option("--resume", is_flag=False, flag_value="", default=None, help="Go on from a checkpoint, or the newest.")
@click.option("--overwrite", is_flag=True, help="Begin anew where an earlier run is.")
@click.option("--allow-other-versions", is_flag=True, help="Resume although other plugin versions began the run.")
@click.option("--deepspeed", metavar="NAME", help="runtime.deepspeed: zero1, zero2, zero3, zero2_offload, a JSON file.")
@click.option("--fsdp", is_flag=True, default=None, help="runtime.fsdp: FSDP2.")
@click.option("--nproc", type=click.IntRange(1), envvar="NPROC_PER_NODE", help="Processes on this node: one a GPU.")
@click.option("--nnodes", type=click.IntRange(1), envvar="NNODES", default=1, help="Nodes; start this on each.")
@click.option("--node-rank", type=click.IntRange(0), envvar="NODE_RANK", default=0, help="This node's number, from 0.")
@click.option("--master-addr", envvar=["MASTER_ADDR", "ADDR"], help="The first node's address, the same on all.")
@click.option("--master-port", type=int, envvar="MASTER_PORT", help="A free port of it, the same on all: 29500.")
def train(
    config: str,
    settings: tuple[str, ...],
    work_dir: Path | None,
    seed: int | None,
    resume: str | None,
    overwrite: bool,
    allow_other_versions: bool,
    deepspeed: str | None,
    fsdp: bool | None,
    nproc: int | None,
    nnodes: int,
    node_rank: int,
    master_addr: str | None,
    master_port: int | None,
) -> int:
    """Train. CONFIG is a file, a shipped name, or the config.json of an earlier run.

    With --nproc, torchrun takes over this process and starts as many; its signals and exit code are its own.
    """
    from mmft.config.load import find_config, override
    from mmft.train import launch

    plugins = loaded_plugins()
    loaded = loaded_config(config, settings, plugins)
    changes = {
        "runtime.output_dir": work_dir,
        "runtime.seed": seed,
        "runtime.deepspeed": deepspeed,
        "runtime.fsdp": fsdp,
    }
    loaded = override(loaded, {path: value for path, value in changes.items() if value is not None})
    if not launch.started_already(os.environ) and (nproc or nnodes > 1):
        from mmft.config.check import check_config

        check_config(loaded, plugins)  # one process says what is wrong, not all of them
        processes = launch.Launch(nproc or 1, nnodes, node_rank, master_addr, master_port)
        launch.replace_by_torchrun(processes, sys.argv[1:])
    source = find_config(config, plugins)
    from mmft.train.run import train as run

    where = Path(resume) if resume else resume is not None
    return run(loaded, plugins, source=source, resume=where, overwrite=overwrite, other_versions=allow_other_versions)


@click.command()
@CONFIG
@SET
def check(config: str, settings: tuple[str, ...]) -> None:
    """Find everything wrong with a config, without reading a weight."""
    from mmft.config.check import find_problems
    from mmft.data.check_format import format_problems
    from mmft.errors import ConfigError

    plugins = loaded_plugins()
    loaded = loaded_config(config, settings, plugins)
    problems = list(find_problems(loaded, plugins))
    problems += format_problems(loaded, plugins, problems)
    if problems:
        raise ConfigError(problems)
    click.echo(f"{config}: no problem found")


@click.command()
@CONFIG
@SET
def show(config: str, settings: tuple[str, ...]) -> None:
    """Print the resolved config as JSON, which `mmft train` accepts."""
    from mmft.config.load import dump_config

    click.echo(dump_config(loaded_config(config, settings, loaded_plugins())))


ONE_A_KIND = ", as mmft has one config for each kind of run, not for each model: copy one, then set model.llm.path"


@click.command("list-cfg")
@click.option("-p", "--pattern", default="", help="Only names or summaries that hold this text.")
def list_cfg(pattern: str) -> None:
    """List the shipped configs."""
    from mmft.config.foreign import xtuner_name_hint
    from mmft.config.load import list_configs
    from mmft.errors import UnknownName, did_you_mean

    configs = list(list_configs(loaded_plugins()))
    rows = [(c.name, c.summary) for c in configs if pattern.lower() in f"{c.name} {c.summary}".lower()]
    if not rows:
        names = [c.name for c in configs]
        hint = xtuner_name_hint(pattern, names) or did_you_mean(pattern, names) or ONE_A_KIND
        raise UnknownName(f"no config matches {pattern!r}{hint}; see: mmft list-cfg")
    print_rows([("NAME", "WHAT"), *rows])


@click.command("copy-cfg")
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path), default=Path())
def copy_cfg(name: str, destination: Path) -> None:
    """Copy a shipped config, to edit it."""
    from mmft.config.load import copy_config

    click.echo(copy_config(name, destination, loaded_plugins()))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def plugins(as_json: bool) -> None:
    """List the plugins, what each offers, and why one did not load."""
    import json

    from mmft.plugins import listing, offers_text

    loaded = loaded_plugins()
    if as_json:
        click.echo(json.dumps(listing(loaded), indent=2))
        return
    rows = [(entry["name"], entry["from"], offers_text(entry)) for entry in listing(loaded)]
    print_rows([("NAME", "FROM", "OFFERS"), *rows])


COMMANDS = (train, check, show, list_cfg, copy_cfg, plugins)

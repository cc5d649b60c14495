"""The command for those who come from XTuner with a config: `mmft convert xtuner-config`."""

from pathlib import Path

import click

from mmft.cli.shared import loaded_plugins

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("xtuner-config")
@click.argument("old", metavar="OLD.py", type=FILE)
@click.argument("new", metavar="[NEW.py]", type=FILE, required=False)
@click.option("--overwrite", is_flag=True, help="Replace NEW.py where it exists.")
def xtuner_config(old: Path, new: Path | None, overwrite: bool) -> int:
    """Write an XTuner 0.1 config as an mmft config, and say what differs.

    OLD.py is read, not run; xtuner need not be installed. NEW.py is OLD_mmft.py in this folder where it is not given.
    The exit code is 1 where something is left to do by hand.
    """
    from mmft.config.check import find_problems
    from mmft.config.load import load_config
    from mmft.convert.xtuner.config import translate
    from mmft.errors import ConfigError, Problem

    target = new or Path(f"{old.stem}_mmft.py")
    if target.exists() and not overwrite:
        raise ConfigError([Problem(str(target), "exists already", "choose another file, or --overwrite")])
    plugins = loaded_plugins()
    made = translate(old, plugins)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(made.text, "utf-8")
    problems = [str(problem) for problem in find_problems(load_config(str(target), plugins), plugins)]
    click.echo(f"{target}: written from {old}")
    report = made.report
    for title, lines in (
        ("to do by hand", report.edits),
        ("done otherwise here", report.differs),
        ("no counterpart", report.lost),
        ("mmft check finds", problems),
    ):
        if lines:
            click.echo(f"{title}:")
        for line in lines:
            click.echo(f"  - {line}")
    left = [title for title, lines in (("to do by hand", report.edits), ("mmft check finds", problems)) if lines]
    if left:
        click.echo(
            f"next: mend in {target} what stands under {' and '.join(map(repr, left))}; then mmft check {target}"
        )
    else:
        click.echo(f"nothing to do by hand; next: mmft train {target}")
    return 1 if report.edits else 0


COMMANDS = (xtuner_config,)

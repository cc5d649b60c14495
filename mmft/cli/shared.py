"""What several commands need: loaded plugins, a loaded config, rows of text."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mmft.config import TrainConfig
    from mmft.plugins import Plugins

CONFIG = click.argument("config")
SET = click.option("--set", "settings", multiple=True, metavar="A.B.C=VALUE", help="Change one value of the config.")


def loaded_plugins() -> "Plugins":
    """All plugins, those named by `--plugin` included; of these one that does not load is a warning, once a command."""
    from mmft.plugins import load_plugins, named_module

    context = click.get_current_context(silent=True)
    names = (context.find_root().params.get("plugin") or ()) if context else ()
    plugins = load_plugins([named_module(name) for name in names])
    told = context.meta.setdefault(__name__, set()) if context else set()
    for plugin in plugins.broken:
        if not plugin.distribution and plugin.name not in told:
            told.add(plugin.name)
            click.echo(f"mmft: warning: {plugin.origin} did not load: {plugin.error}", err=True)
    return plugins


def loaded_config(config: str, settings: tuple[str, ...], plugins: "Plugins") -> "TrainConfig":
    """The config of a path or name, with its `--set`s."""
    from mmft.config.load import load_config

    return load_config(config, plugins, settings)


def print_rows(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as they need; the last one runs free."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]))

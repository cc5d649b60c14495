"""What several commands need: loaded plugins, a loaded config, rows of text."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mmft.config import TrainConfig
    from mmft.plugins import Plugins

CONFIG = click.argument("config")
SET = click.option("--set", "settings", multiple=True, metavar="A.B.C=VALUE", help="Change one value of the config.")


def loaded_plugins() -> "Plugins":
    """All plugins, those named by `--plugin` included."""
    from mmft.errors import PluginError
    from mmft.plugins import load_plugins

    context = click.get_current_context(silent=True)
    names = (context.find_root().params.get("plugin") or ()) if context else ()
    modules = []
    for name in names:
        sys.path.insert(0, str(Path.cwd()))
        try:
            modules.append(importlib.import_module(name.removesuffix(".py")))
        except Exception as error:
            raise PluginError(f"--plugin {name}: {error}") from error
        finally:
            sys.path.pop(0)
    return load_plugins(modules)


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

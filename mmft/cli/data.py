"""Commands about data: `mmft data ...`."""

import click

from mmft.cli.shared import CONFIG, SET, loaded_config, loaded_plugins


@click.group()
def data() -> None:
    """Look at what a config trains on."""


@data.command("show")
@CONFIG
@SET
@click.option("-n", "number", default=3, show_default=True, help="How many samples.")
def data_show(config: str, settings: tuple[str, ...], number: int) -> None:
    """Print samples with their mask: what is trained, what is context, where the pictures are."""
    from rich.console import Console

    from mmft.data.inspect import show_samples

    plugins = loaded_plugins()
    for line in show_samples(loaded_config(config, settings, plugins), plugins, number):
        Console().print(line, soft_wrap=True)

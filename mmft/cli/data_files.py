"""Commands about data files, with or without a config: `mmft data formats`, `repeat`, `replace`, `convert`."""

import click

COMMANDS: tuple[click.Command, ...] = ()

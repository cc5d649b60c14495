"""Commands about data files, with or without a config: `mmft data formats`, `repeat`, `replace`, `convert`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mmft.cli.shared import loaded_plugins, print_rows

FILE = click.Path(path_type=Path, dir_okay=False)
FILES = click.Path(path_type=Path)  # a file, a folder or a glob
SHOWN = 10  # dropped records that are listed


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that reads data without a config: `source`, `source_option`, `extract_to`."""
    for option in (
        click.option("--extract-to", type=click.Path(path_type=Path, file_okay=False),
                     help="FILE: folder for the pictures inside parquet files and WebDataset shards."),
        click.option("--source-option", multiple=True, metavar="KEY=VALUE",
                     help="FILE: an option of its data source, such as delimiter=; or field=data."),
        click.option("--source", help="FILE: read it with this data source instead of the one of its suffix."),
    ):  # fmt: skip
        command = option(command)
    return command


def options_of(source_option: tuple[str, ...], extract_to: Path | None) -> dict[str, Any]:
    """The options of a data source; a value is JSON, or the text itself where it is none."""
    import json

    found: dict[str, Any] = {} if extract_to is None else {"extract_to": str(extract_to)}
    for one in source_option:
        key, equals, text = one.partition("=")
        if not equals:
            raise click.UsageError(f"--source-option {one}: has no '='; write: --source-option delimiter=;")
        try:
            found[key.strip()] = json.loads(text)
        except ValueError:
            found[key.strip()] = text
    return found


@click.command("formats")
@click.argument("name", required=False)
@click.option("--file", type=FILES, help="Say which format this file, folder or glob is in.")
@source_options
def data_formats(
    name: str | None, file: Path | None, source: str | None, source_option: tuple[str, ...], extract_to: Path | None
) -> None:
    """List the data formats; with NAME show an example of one, with --file say which a file is in."""
    import json

    from mmft.data.formats import added_text, formats_rows, recognise, source_use

    if name is not None and file is not None:
        raise click.UsageError(f"give {name} or --file, not both; to read a file as {name}: "
                               f"mmft data check {file} --data-map {name}")  # fmt: skip
    options = options_of(source_option, extract_to)
    if file is None and (source or options):
        raise click.UsageError("--source, --source-option and --extract-to need --file")
    plugins = loaded_plugins()
    if file is not None:
        ((best, reason), *others), probed = recognise(source_use(file, plugins, source, options), plugins)
        click.echo(f"{file}: {best.name}: {reason}")
        _say_added(best.name, added_text(best, probed))
        if others:
            click.echo(f"also possible: {', '.join(data_map.name for data_map, _ in others)}")
    elif name is not None:
        data_map = plugins.data_maps.get(name)
        click.echo(f"{data_map.name}: {data_map.summary}; columns: {', '.join(data_map.columns) or 'not named'}")
        for example in data_map.examples[:1]:
            click.echo(json.dumps(example, ensure_ascii=False, indent=2))
    else:
        print_rows([("name", "columns", "summary"), *formats_rows(plugins)])


@click.command("repeat")
@click.argument("source", metavar="IN", type=FILE)
@click.argument("target", metavar="OUT", type=FILE)
@click.option("-n", "times", default=200, show_default=True, help="How many times.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
def data_repeat(source: Path, target: Path, times: int, overwrite: bool) -> None:
    """Write the records of a JSON or JSON-lines file N times over."""
    from mmft.data.rewrite import repeat

    _may_write(target, overwrite)
    with _bar("repeating") as report:
        number = repeat(source, target, times, loaded_plugins(), report)
    click.echo(f"{target}: {number:,} records")


@click.command("replace")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--old", required=True, help="The text to replace.")
@click.option("--new", required=True, help="What stands in its place.")
@click.option("--in-keys", is_flag=True, help="Replace in the keys of objects too.")
def data_replace(paths: tuple[Path, ...], old: str, new: str, in_keys: bool) -> None:
    """Replace a text in the strings of JSON and JSON-lines files, and of all such files in a folder."""
    from mmft.data.rewrite import json_files, replace

    files = json_files(paths)
    counts = []
    with _bar("replacing", sum(file.stat().st_size for file in files)) as report:
        for file in files:
            counts.append((file, replace(file, old, new, in_keys=in_keys, report=report)))
    for file, count in counts:
        if count:
            click.echo(f"{file}: {count:,}")
    changed = sum(count > 0 for _, count in counts)
    click.echo(f"replaced {sum(count for _, count in counts):,} in {changed:,} of {len(files):,} files")


@click.command("convert")
@click.argument("file", metavar="IN", type=FILES)
@click.argument("target", metavar="OUT", type=FILE)
@click.option("--from", "origin", default="", metavar="FORMAT", help="The format of IN; found out where not given.")
@click.option("--to", required=True, metavar="FORMAT", help="The format of OUT.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
@click.option("--max-bad-fraction", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="Where more records than this cannot be converted, OUT is not written.")  # fmt: skip
@source_options
def data_convert(
    file: Path,
    target: Path,
    origin: str,
    to: str,
    overwrite: bool,
    max_bad_fraction: float,
    source: str | None,
    source_option: tuple[str, ...],
    extract_to: Path | None,
) -> None:
    """Write the records of a file, a folder or a glob in another format, to JSON or JSON lines."""
    from mmft.data.formats import source_use
    from mmft.data.rewrite import convert

    _may_write(target, overwrite)
    plugins = loaded_plugins()
    reading = source_use(file, plugins, source, options_of(source_option, extract_to))
    with _bar("converting") as report:
        done = convert(
            reading, target, plugins, to=to, origin=origin, max_bad_fraction=max_bad_fraction, report=report
        )  # fmt: skip
    mended = f", {done.repairs:,} of them mended" if done.repairs else ""
    dropped = f"; dropped {len(done.drops):,}:" if done.drops else ""
    click.echo(f"{target}: {done.written:,} records from {done.source} to {done.target}{mended}{dropped}")
    for number, reason in done.drops[:SHOWN]:
        click.echo(f"  record {number:,}: {reason}")
    if len(done.drops) > SHOWN:
        click.echo(f"  and {len(done.drops) - SHOWN:,} more")
    _say_added(done.source, done.adds)


def _say_added(data_map: str, text: str) -> None:
    if text:
        click.echo(f"{data_map} adds the system text {text!r} to records that have none")


def _may_write(target: Path, overwrite: bool) -> None:
    from mmft.errors import DataError

    if target.exists() and not overwrite:
        raise DataError(f"{target}: exists already; give another name, or --overwrite")


@contextmanager
def _bar(what: str, total: float | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal's stderr; nothing where there is none. Gives the function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


COMMANDS: tuple[click.Command, ...] = (data_formats, data_repeat, data_replace, data_convert)

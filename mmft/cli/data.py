"""Commands about data: `mmft data ...`."""

from dataclasses import replace
from pathlib import Path

import click

from mmft.cli.data_files import options_of, source_options
from mmft.cli.shared import CONFIG, SET, loaded_config, loaded_plugins

PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def data() -> None:
    """Look at what a config trains on."""


@data.command("show")
@CONFIG
@SET
@click.option(
    "-n", "number", type=click.IntRange(1), help="How many samples of each dataset.  [default: 3; 1 at --index]"
)
@click.option("--index", type=click.IntRange(1), help="Begin at this record, counted from 1.")
@click.option("--search", metavar="TEXT", help="Only records that say this; upper and lower case are one.")
@click.option("--dataset", "which", type=click.IntRange(0), help="Only data.datasets.K, counted from 0.", metavar="K")
@click.option("--packed", type=click.IntRange(1), metavar="ROW", help="A packed row, counted from 1, with its borders.")
@click.option("--html", type=PATH, help="Write a page with thumbnails instead of printing.")
def data_show(
    config: str,
    settings: tuple[str, ...],
    number: int | None,
    index: int | None,
    search: str | None,
    which: int | None,
    packed: int | None,
    html: Path | None,
) -> None:
    """Print samples with their mask: what is trained, what is context, where the pictures are."""
    from rich.console import Console

    from mmft.data.argument import is_data_file
    from mmft.data.inspect import Choice, Views, terminal_lines

    if packed and (index or search or which is not None):
        raise click.UsageError("--packed shows a row of the whole run; leave out --index, --search and --dataset")
    plugins = loaded_plugins()
    if is_data_file(config, plugins):
        raise click.UsageError(f"{config} is data, and show needs a config; a file is looked at by: "
                               f"mmft data check {config}")  # fmt: skip
    views = Views(loaded_config(config, settings, plugins), plugins)
    count = number or (1 if index else 3)
    chosen = views.packed(packed) if packed else views.samples(Choice(count, index or 1, search, which))
    if html:
        from mmft.data.inspect_html import write_page

        write_page(html, config, chosen, views.tokenizer)
        click.echo(html)
        return
    for line in terminal_lines(chosen, views.tokenizer):
        Console().print(line, soft_wrap=True)


@data.command("check")
@click.argument("config_or_file", metavar="CONFIG|FILE")
@SET
@click.option("--out", type=PATH, help="Folder for dropped.jsonl, bad_images.jsonl and report.html.")
@click.option("--html", type=PATH, help="Write the page here instead.")
@click.option("--decode", is_flag=True, help="Read whole images, not only headers: finds files that are cut off.")
@click.option("--data-map", help="FILE: read it with this data map instead of the one it looks like.")
@source_options
@click.option("--image-folder", type=FOLDER, help="FILE: where its image paths start; images are then opened.")
@click.option("--llm", metavar="PATH", help="FILE: count lengths in this model's tokens.")
@click.option(
    "--chat-template", default="auto", show_default=True, help="FILE: with --llm, the template to count with."
)
@click.option("--max-bad-fraction", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="FILE: more records than this that cannot be trained on are a failure.")  # fmt: skip
@click.pass_context
def data_check(
    context: click.Context,
    config_or_file: str,
    settings: tuple[str, ...],
    out: Path | None,
    html: Path | None,
    decode: bool,
    data_map: str | None,
    source: str | None,
    source_option: tuple[str, ...],
    extract_to: Path | None,
    image_folder: Path | None,
    llm: str | None,
    chat_template: str,
    max_bad_fraction: float,
) -> None:
    """Read every record and open every image; say what would be trained, what not, and why.

    Exits with 2 where too much is bad, an image cannot be read, or the template is not the model's own.
    """
    from rich.console import Console

    from mmft.data.argument import is_data_file, refuse_missing, report_name
    from mmft.data.check import bars, check_config_data
    from mmft.data.check_file import FileOptions, check_file
    from mmft.data.check_report import terminal_lines, write_report
    from mmft.data.dataset import format_hints

    plugins = loaded_plugins()
    with bars() as progress:
        if is_data_file(config_or_file, plugins) or source:
            if settings:
                raise click.UsageError("--set is for a config; a data file has --data-map, --image-folder and --llm")
            path = Path(config_or_file)
            options = FileOptions(
                data_map=data_map, source=source, source_options=options_of(source_option, extract_to),
                image_folder=image_folder, llm=llm, chat_template=chat_template,
                max_bad_fraction=max_bad_fraction, decode=decode,
            )  # fmt: skip
            report = check_file(path, plugins, options, progress)
            folder = Path("work_dirs/check") / report_name(path)
        else:
            refuse_missing(config_or_file)
            _refuse_file_options(context)
            config = loaded_config(config_or_file, settings, plugins)
            report = check_config_data(config, plugins, progress, decode=decode)
            hints = format_hints(config.data, plugins, report.drops) if report.problems else ()
            report = replace(report, problems=(*report.problems, *hints))
            folder = config.runtime.output_dir / "check"
    page = html or (out or folder) / "report.html"
    write_report(report, out or folder, page)
    for line in terminal_lines(report):
        Console().print(line, soft_wrap=True)
    click.echo(f"look at {page}; records: {(out or folder) / 'dropped.jsonl'}")
    context.exit(report.exit_code)


IN_A_CONFIG = {
    "data_map": "data.datasets.0.data_map=...",
    "source": "data.datasets.0.source=...",
    "source_option": "data.datasets.0.source.KEY=VALUE",
    "extract_to": "data.datasets.0.source.extract_to=...",
    "image_folder": "data.datasets.0.image_folder=...",
    "llm": "model.llm.path=...",
    "chat_template": "data.chat_template=...",
    "max_bad_fraction": "data.max_bad_fraction=...",
}


def _refuse_file_options(context: click.Context) -> None:
    """An option that would be passed over is an error."""
    for name, setting in IN_A_CONFIG.items():
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} is for a data file; in a config it is --set {setting}")

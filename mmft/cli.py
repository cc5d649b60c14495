"""The command line. Each command parses and calls one function; heavy imports happen inside, so help is quick."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mmft.config import TrainConfig
    from mmft.inference import Assistant
    from mmft.plugins import Plugins


class Commands(click.Group):
    """Our commands, and those plugins add through `mmft_add_commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Sorted; plugins are loaded to know theirs."""
        self._add_plugin_commands()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Ours without loading any plugin; else a plugin's."""
        if super().get_command(ctx, name) is None:
            self._add_plugin_commands()
        return super().get_command(ctx, name)

    def _add_plugin_commands(self) -> None:
        from mmft.errors import PluginError

        ours = dict(self.commands)
        try:
            _plugins().call("mmft_add_commands", cli=self)
        except PluginError as error:  # help must come up whatever a plugin does
            click.echo(f"mmft: warning: {error}", err=True)
        self.commands.update(ours)  # a plugin adds commands, it replaces none


def main() -> None:
    """Run the command line: 0 when all went well, 2 for what the user can mend, a traceback for a bug of ours."""
    from mmft.errors import MmftError

    debug = "--debug" in sys.argv
    _quiet()
    try:
        code = cli(args=[a for a in sys.argv[1:] if a != "--debug"], standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except MmftError as error:
        if debug:
            raise
        click.echo(f"mmft: error: {error}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _quiet() -> None:
    """Keep off the screen what libraries say to each other and no user can act on."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # plain lines in a log file
    # bitsandbytes misses an optional inference kernel of the hub; peft uses a name that transformers renames
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _plugins() -> "Plugins":
    import importlib

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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--plugin", multiple=True, help="Also load this Python module as a plugin (my_map.py).")
@click.version_option(package_name="mmft")
def cli(plugin: tuple[str, ...]) -> None:
    """Turn a language model into one that sees.

    Start with `mmft list-cfg`, copy one with `mmft copy-cfg`, then `mmft train` it and `mmft chat` with the result.
    Add --debug to any command for the traceback of an error.
    """


CONFIG = click.argument("config")
SET = click.option("--set", "settings", multiple=True, metavar="A.B.C=VALUE", help="Change one value of the config.")


@cli.command()
@CONFIG
@SET
@click.option("--work-dir", type=click.Path(path_type=Path), help="Where the run is written (runtime.output_dir).")
@click.option("--seed", type=int, help="runtime.seed.")
@click.option("--resume", is_flag=False, flag_value="", default=None, help="Go on from a checkpoint, or the newest.")
@click.option("--overwrite", is_flag=True, help="Begin anew where an earlier run is.")
def train(
    config: str, settings: tuple[str, ...], work_dir: Path | None, seed: int | None, resume: str | None, overwrite: bool
) -> int:
    """Train. CONFIG is a file, a shipped name, or the config.json of an earlier run."""
    from mmft.config.load import find_config, override

    plugins = _plugins()
    loaded = _load(config, settings, plugins)
    changes = {"runtime.output_dir": work_dir, "runtime.seed": seed}
    loaded = override(loaded, {path: value for path, value in changes.items() if value is not None})
    source = find_config(config, plugins)
    from mmft.train.run import train as run

    where = Path(resume) if resume else resume is not None
    return run(loaded, plugins, source=source, resume=where, overwrite=overwrite)


def _load(config: str, settings: tuple[str, ...], plugins: "Plugins") -> "TrainConfig":
    from mmft.config.load import load_config

    return load_config(config, plugins, settings)


@cli.command()
@CONFIG
@SET
def check(config: str, settings: tuple[str, ...]) -> None:
    """Find everything wrong with a config, without reading a weight."""
    from mmft.config.check import check_config

    plugins = _plugins()
    check_config(_load(config, settings, plugins), plugins)
    click.echo(f"{config}: no problem found")


@cli.command()
@CONFIG
@SET
def show(config: str, settings: tuple[str, ...]) -> None:
    """Print the resolved config as JSON, which `mmft train` accepts."""
    from mmft.config.load import dump_config

    click.echo(dump_config(_load(config, settings, _plugins())))


@cli.command("list-cfg")
@click.option("-p", "--pattern", default="", help="Only names or summaries that hold this text.")
def list_cfg(pattern: str) -> None:
    """List the shipped configs."""
    from mmft.config.load import list_configs

    rows = [(c.name, c.summary) for c in list_configs(_plugins()) if pattern.lower() in f"{c.name} {c.summary}".lower()]
    _print_rows([("NAME", "WHAT"), *rows])


@cli.command("copy-cfg")
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path), default=Path())
def copy_cfg(name: str, destination: Path) -> None:
    """Copy a shipped config, to edit it."""
    from mmft.config.load import copy_config

    click.echo(copy_config(name, destination, _plugins()))


@cli.group()
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

    plugins = _plugins()
    for line in show_samples(_load(config, settings, plugins), plugins, number):
        Console().print(line, soft_wrap=True)


MODEL = click.argument("model", required=False)
BITS = click.option("--bits", type=click.Choice(["4", "8", "16"]), help="Load the language model in so many bits.")
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
LLM_PATH = click.option("--llm", help="Where the base language model is now, if it moved.")
TEMPLATE = click.option("--prompt-template", help="Another chat template than the one it was trained with.")


def _assistant(
    model: str | None, device: str, bits: str | None = None, llm: str | None = None, template: str | None = None
) -> "Assistant":
    from mmft.inference import find_model, load_assistant
    from mmft.modeling.llm import choose_device

    folder = find_model(model)
    click.echo(f"model: {folder}", err=True)
    quantization = {"4": "nf4", "8": "int8", "16": "none", None: None}[bits]
    return load_assistant(
        folder, _plugins(), device=choose_device(device), quantization=quantization, llm=llm, chat_template=template
    )


@cli.command()
@MODEL
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; may be repeated.")
@click.option("-m", "--message", help="Ask this, print the answer, and end.")
@click.option("--system", help="System text.")
@click.option("--max-new-tokens", default=512, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=50, show_default=True)
@click.option("--repetition-penalty", default=1.0, show_default=True)
@click.option("--seed", type=int)
@BITS
@DEVICE
@LLM_PATH
@TEMPLATE
def chat(
    model: str | None,
    images: tuple[Path, ...],
    message: str | None,
    system: str | None,
    bits: str | None,
    device: str,
    llm: str | None,
    prompt_template: str | None,
    **generation: Any,
) -> int:
    """Talk to a model: a run, its final/ folder, a checkpoint, or by default the newest finished run."""
    from mmft.chat.terminal import run_terminal
    from mmft.inference import Generation

    assistant = _assistant(model, device, bits, llm, prompt_template)
    return run_terminal(assistant, Generation(**generation), images=images, message=message, system=system)


@cli.command()
@MODEL
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=7860, show_default=True)
@click.option("--share", is_flag=True, help="Also through a public gradio address.")
@BITS
@DEVICE
@LLM_PATH
@TEMPLATE
def web(
    model: str | None,
    host: str,
    port: int,
    share: bool,
    bits: str | None,
    device: str,
    llm: str | None,
    prompt_template: str | None,
) -> None:
    """Open a chat page with pictures on this machine."""
    from mmft.chat.web import serve

    serve(_assistant(model, device, bits, llm, prompt_template), host=host, port=port, share=share)


@cli.command("eval")
@click.argument("model")
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("--data-map", default="llava", show_default=True)
@click.option("--image-folder", type=click.Path(path_type=Path))
@click.option("--training", type=click.Path(path_type=Path), help="Training file, for the most-frequent-answer line.")
@click.option("--training-image-folder", type=click.Path(path_type=Path))
@click.option("--limit", type=int, help="A fixed random choice of so many questions.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--ask-first", help="Open each conversation with this, answered by the model itself.")
@click.option("--out", type=click.Path(path_type=Path), help="Write eval.json and answers.jsonl into this folder.")
@BITS
@DEVICE
@LLM_PATH
@TEMPLATE
def evaluate(
    model: str,
    bits: str | None,
    device: str,
    llm: str | None,
    prompt_template: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Exact-match accuracy on the questions of a file, each asked on its own."""
    from mmft.evaluate.exact_match import evaluate_files, write_result

    result = evaluate_files(_assistant(model, device, bits, llm, prompt_template), _plugins(), **options)
    _print_rows(result.table())
    if out:
        write_result(result, out)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def plugins(as_json: bool) -> None:
    """List the plugins, what each offers, and why one did not load."""
    import json

    from mmft.plugins import listing, offers_text

    loaded = _plugins()
    if as_json:
        click.echo(json.dumps(listing(loaded), indent=2))
        return
    rows = [(entry["name"], entry["from"], offers_text(entry)) for entry in listing(loaded)]
    _print_rows([("NAME", "FROM", "OFFERS"), *rows])


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as they need; the last one runs free."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]))

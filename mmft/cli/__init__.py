"""The command line. Each command parses and calls one function; heavy imports happen inside, so help is quick."""

import errno
import logging
import os
import sys
import warnings

import click

from mmft.cli import convert, convert_gguf, convert_push, convert_xtuner, data, data_files, machine, runs, serve, talk
from mmft.cli.from_xtuner import option_advice, verb_advice
from mmft.cli.shared import loaded_plugins
from mmft.errors import MmftError, PluginError, UnknownName


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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a verb of XTuner's that nobody offers is an `UnknownName` that says what to type here."""
        if (advice := verb_advice(args[0])) and self.get_command(ctx, args[0]) is None:
            raise UnknownName(advice)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """As click does; an option of XTuner's is an `UnknownName` that says what to type here."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            words = error.ctx.command_path.removeprefix(ctx.command_path).strip() if error.ctx else ""
            if advice := option_advice(words, error.option_name):
                raise UnknownName(advice) from None
            raise

    def _add_plugin_commands(self) -> None:
        ours = dict(self.commands)
        try:
            loaded_plugins().call("mmft_add_commands", cli=self)
        except PluginError as error:  # help must come up whatever a plugin does
            click.echo(f"mmft: warning: {error}", err=True)
        self.commands.update(ours)  # a plugin adds commands, it replaces none


def main() -> None:
    """Run the command line: 0 when all went well, 2 for what the user can mend, a traceback for a bug of ours."""
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
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        click.echo(f"mmft: error: {error.filename or 'a file'} cannot be written: {error.strerror}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _quiet() -> None:
    """Keep off the screen what libraries say to each other and no user can act on."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # plain lines in a log file
    # bitsandbytes misses an optional inference kernel of the hub; peft uses a name that transformers renames
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # DeepSpeed, where it is installed, says on standard output that there is no GPU, whoever imports it
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # what DeepSpeed, FSDP and peft call under its old name, at every step and from every process
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "gradient_checkpointing_enable"):
        warnings.filterwarnings("ignore", message=f".*{name}. is deprecated", category=FutureWarning)
    # ten lines about five attempts before the one that says what is wrong
    logging.getLogger("huggingface_hub.utils._http").addFilter(_is_no_attempt)


def _is_no_attempt(record: logging.LogRecord) -> bool:
    told = record.getMessage()
    return "thrown while requesting" not in told and not told.startswith("Retrying in")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--plugin", multiple=True, help="Also load this Python file or module as a plugin (my_map.py).")
@click.version_option(package_name="mmft")
def cli(plugin: tuple[str, ...]) -> None:
    """Turn a language model into one that sees.

    Start with `mmft list-cfg`, copy one with `mmft copy-cfg`, then `mmft train` it and `mmft chat` with the result.
    Add --debug to any command for the traceback of an error.
    """


for _command in (*runs.COMMANDS, data.data, *talk.COMMANDS, *serve.COMMANDS, *machine.COMMANDS, convert.convert):
    cli.add_command(_command)
for _command in (*convert_xtuner.COMMANDS, *convert_push.COMMANDS, *convert_gguf.COMMANDS):
    convert.convert.add_command(_command)
for _command in data_files.COMMANDS:
    data.data.add_command(_command)

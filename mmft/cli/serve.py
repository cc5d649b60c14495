"""The command that answers programs: `mmft serve`."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mmft.cli.shared import loaded_plugins
from mmft.cli.talk import MODEL, MODEL_OPTIONS, SAMPLING_OPTIONS, look_first


@click.command()
@MODEL
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="What clients call the model; by default what its folder is called.")
@click.option("--api-key", envvar="MMFT_API_KEY", help="Clients must give it; best set in MMFT_API_KEY.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="A web page that may ask; may be repeated, * is any.")
@click.option("--max-waiting", type=click.IntRange(0), default=64, show_default=True, help="Questions in the queue.")
@click.option("--max-upload", type=click.IntRange(1), default=50, show_default=True, help="MB, of a whole request.")
@click.option("--max-context", type=click.IntRange(1), help="Tokens of prompt and answer, below the model's own limit.")
@click.option(
    "--engine", type=click.Choice(["auto", "mmft", "transformers", "vllm"]), default="auto", show_default=True,
    help="auto is mmft; the others open only what transformers opens.",
)  # fmt: skip
@MODEL_OPTIONS
@SAMPLING_OPTIONS
def serve(model: str | None, engine: str, **options: Any) -> None:
    """Answer OpenAI's clients at http://127.0.0.1:8000/v1, by default with the newest finished run.

    MODEL is what mmft chat takes. The sampling options hold where a request says nothing; an answer is greedy unless
    one of both says otherwise.
    """
    if engine in ("transformers", "vllm"):
        from mmft.chat.server.engines import command, run

        context, default = click.get_current_context(), ParameterSource.DEFAULT
        given = {name: value for name, value in options.items() if context.get_parameter_source(name) != default}
        run(*command(engine, model, given))
    look_first({"model": model, **options})
    from dataclasses import fields

    from mmft.chat.loading import ModelChoice, load_choice
    from mmft.chat.server.app import ServerOptions, bind
    from mmft.chat.server.app import serve as answer
    from mmft.generation import Generation

    defaults = Generation(**{name: options.pop(name) for name in Generation.__dataclass_fields__})
    server = ServerOptions(**{field.name: options.pop(field.name) for field in fields(ServerOptions)})
    name = options.pop("name")
    bound = bind(server)
    found, assistant = load_choice(ModelChoice(model=model, **options), loaded_plugins())
    click.echo(f"model: {found}", err=True)
    answer(assistant, name or served_name(found), defaults, server, bound)


def served_name(found: str) -> str:
    """A run by its folder, a checkpoint with its run, a model of transformers as it is named there."""
    path = Path(found)
    if not path.is_dir():
        return found
    path = path.resolve()
    if path.name == "final":
        return path.parent.name
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name


COMMANDS = (serve,)

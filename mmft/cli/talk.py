"""Commands about a trained model: chat, web, eval."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmft.cli.data_files import options_of, source_options
from mmft.cli.shared import loaded_plugins, print_rows

if TYPE_CHECKING:
    from mmft.inference import Assistant

Decorator = Callable[[Any], Any]
FILE = click.Path(path_type=Path)
MODEL = click.argument("model", required=False)


def _options(*options: Decorator) -> Decorator:
    """Several options as one decorator, in this order in the help."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


MODEL_OPTIONS = _options(
    click.option("--adapter", metavar="FOLDER", help="A PEFT adapter on MODEL, or on the base that it names."),
    click.option("--llm", help="The base language model: where it is now, or that of a model of parts."),
    click.option("--vision-encoder", help="Of a model of parts: --llm, --vision-encoder and --projector."),
    click.option("--projector", metavar="PATH", help="Its weights, or a model folder of mmft that has one."),
    click.option("--select-layer", type=int, help="The encoder's hidden state, for a model of parts."),
    click.option("--prompt-template", help="Another chat template than the model's own."),
    click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Compute in this."),
    click.option("--bits", type=click.Choice(["4", "8", "16"]), help="Load the language model in so many bits."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True),
)
SAMPLING_OPTIONS = _options(
    click.option("--max-new-tokens", default=512, show_default=True),
    click.option("--temperature", default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-p", default=1.0, show_default=True),
    click.option("--top-k", default=50, show_default=True),
    click.option("--repetition-penalty", default=1.0, show_default=True),
    click.option("--seed", type=int, help="The same seed gives the same answer."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End an answer here too; may be repeated."),
)
TOOL_OPTIONS = _options(
    click.option("--tools", "--with-plugins", "tools", metavar="NAMES", help="Tools the model may call: a,b or all."),
)


class _ListsPlugins(click.Command):
    """A command that also takes XTuner's `--with-plugins calculate solve`, with spaces between the names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the names to one value."""
        if "--with-plugins" in args:
            first = args.index("--with-plugins") + 1
            last = next((n for n in range(first, len(args)) if args[n].startswith("-")), len(args))
            args = [*args[:first], *([",".join(args[first:last])] if last > first else []), *args[last:]]
        return super().parse_args(ctx, args)


def _tools(options: dict[str, Any]) -> list[str]:
    """The names of `--tools`, taken out of the options and checked before a model is loaded."""
    from mmft.chat.tools import choose, tool_names

    names = tool_names(options.pop("tools") or "")
    choose(names, loaded_plugins())
    return names


def look_first(options: dict[str, Any]) -> None:
    """What needs no model, and not torch either, to be found wrong: a picture that is not there, and no run to take.

    Raises `MmftError` for the first of them.
    """
    from mmft.errors import DataError
    from mmft.folders import find_model
    from mmft.foreign_paths import windows_hint

    for image in options.get("images", ()):
        if not image.exists():
            hint = windows_hint(str(image))
            raise DataError(f"--image {image}: no such file" + (f"; {hint}" if hint else ""))
    if not any(options[name] for name in ("model", "adapter", "vision_encoder", "projector")):
        find_model(None)


def _assistant(options: dict[str, Any]) -> "Assistant":
    """Load what the model options name, and take those out of the options."""
    from dataclasses import fields

    from mmft.chat.loading import ModelChoice, load_choice

    choice = ModelChoice(**{field.name: options.pop(field.name) for field in fields(ModelChoice)})
    name, assistant = load_choice(choice, loaded_plugins())
    click.echo(f"model: {name}", err=True)
    return assistant


def _generation(options: dict[str, Any]) -> Any:
    """The sampling options, taken out of the options and checked before a model is loaded."""
    from mmft.generation import Generation

    return Generation(**{name: options.pop(name) for name in Generation.__dataclass_fields__})


def _system(system: str | None, name: str | None) -> str | None:
    """The system text, in full or by its name."""
    if system and name:
        raise click.UsageError("--system and --system-template both give a system text; drop one of them")
    return loaded_plugins().system_texts.get(name).text if name else system


@click.command(cls=_ListsPlugins)
@MODEL
@click.option("--image", "images", multiple=True, type=FILE, help="A picture; may be repeated.")
@click.option("-m", "--message", help="Ask this, print the answer, and end; - reads the question from stdin.")
@click.option("--system", help="System text.")
@click.option("--system-template", help="System text by name; mmft plugins lists them.")
@click.option("--multiline", is_flag=True, help="A question ends with an empty line instead of Enter.")
@click.option("--json", "as_json", is_flag=True, help="Each answer as a line of JSON, with its numbers of tokens.")
@click.option(
    "--no-commands", "commands", is_flag=True, flag_value=False, default=True,
    help="Every line is a question: for data of others, of which a line may begin with /save.",
)  # fmt: skip
@click.option("--max-context", type=click.IntRange(1), help="Tokens of prompt and answer, below the model's own limit.")
@TOOL_OPTIONS
@MODEL_OPTIONS
@SAMPLING_OPTIONS
def chat(system: str | None, system_template: str | None, **options: Any) -> int:
    """Talk to a model, by default the newest finished run.

    MODEL is a run, its final/ folder, a checkpoint, a PEFT adapter, or a text or LLaVA model of transformers by folder
    or name. A pipe's lines are questions and commands. Only answers go to stdout; the exit code is 2 if a line failed.
    """
    look_first(options)
    from mmft.chat.terminal import run_terminal

    generation, text, tools = _generation(options), _system(system, system_template), _tools(options)
    return run_terminal(_assistant(options), generation, system=text, tools=tools, plugins=loaded_plugins(), **options)


@click.command(cls=_ListsPlugins)
@MODEL
@click.option("--compare", metavar="MODEL", help="A second model, which answers every question beside the first.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free one.")
@click.option("--share", is_flag=True, help="Also through a public gradio address.")
@click.option("--auth", multiple=True, envvar="MMFT_WEB_AUTH", metavar="USER:PASSWORD", help="May be repeated.")
@click.option("--max-upload", type=click.IntRange(1, 50), default=20, show_default=True, help="MB, of each picture.")
@click.option("--max-waiting", type=click.IntRange(1), default=64, show_default=True, help="Questions in the queue.")
@click.option("--lang", "language", type=click.Choice(["auto", "en", "zh"]), default="auto", show_default=True)
@click.option("--examples", type=FILE, metavar="FOLDER", help="Pictures to try, offered on the page.")
@click.option("--system", help="System text; the page can change it.")
@click.option("--system-template", help="System text by name; mmft plugins lists them.")
@click.option("--max-context", type=click.IntRange(1), help="Tokens of prompt and answer, below the model's own limit.")
@TOOL_OPTIONS
@MODEL_OPTIONS
@SAMPLING_OPTIONS
def web(compare: str | None, system: str | None, system_template: str | None, **options: Any) -> None:
    """Open a chat page with pictures on this machine.

    The sampling options are what the page begins with. Passwords are best given in MMFT_WEB_AUTH (several with spaces
    between), where a list of processes does not show them. --device, --dtype and --bits hold for both models.
    """
    look_first(options)
    from mmft.chat.loading import ModelChoice
    from mmft.chat.web.options import PageOptions, ServeOptions, example_pictures
    from mmft.chat.web.server import bind, load_seats, serve

    def taken(kind: Any, *others: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in (*kind.__dataclass_fields__, *others) if name in options}

    server = ServeOptions(**taken(ServeOptions))
    bound = bind(server)
    generation, text, pictures = _generation(options), _system(system, system_template), options.pop("examples")
    page = PageOptions(generation=generation, system=text, examples=example_pictures(pictures), **taken(PageOptions))
    tools = _tools(options)
    seats = load_seats(ModelChoice(**taken(ModelChoice)), compare, tools, loaded_plugins())
    for seat in seats:
        click.echo(f"model: {seat.name}", err=True)
    serve(seats, page, server, bound)


@click.command("eval")
@click.argument("model")
@click.argument("file", type=FILE)
@click.option("--data-map", help="Read FILE with this data map instead of the one it looks like.")
@source_options
@click.option("--image-folder", type=FILE, help="Where the image paths of FILE start.")
@click.option("--training", type=FILE, help="Training file, for the most-frequent-answer line; read as FILE is.")
@click.option("--training-image-folder", type=FILE, help="Where its image paths start, if not where those of FILE do.")
@click.option("--limit", type=click.IntRange(1), help="A fixed random choice of so many questions.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--ask-first", help="Open each conversation with this, answered by the model itself.")
@click.option("--out", type=FILE, help="Write eval.json and answers.jsonl into this folder.")
@MODEL_OPTIONS
def evaluate(
    file: Path,
    data_map: str | None,
    source: str | None,
    source_option: tuple[str, ...],
    extract_to: Path | None,
    image_folder: Path | None,
    training: Path | None,
    training_image_folder: Path | None,
    limit: int | None,
    batch_size: int,
    ask_first: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Exact-match accuracy on the questions of a file, each asked on its own.

    FILE is what `mmft data check` reads: a file, a folder or a glob, in any format and of any data source.
    """
    from mmft.evaluate.exact_match import Question, file_dataset, read_questions, write_result
    from mmft.evaluate.exact_match import evaluate as ask

    def read(path: Path, folder: Path | None) -> list[Question]:
        dataset = file_dataset(
            path, plugins, data_map=data_map, source=source, source_options=options_of(source_option, extract_to),
            image_folder=folder,
        )  # fmt: skip
        found = read_questions(dataset, plugins)
        click.echo(f"{path}: {len(found):,} questions, read as {dataset.data_map}", err=True)
        return found

    plugins = loaded_plugins()
    questions = read(file, image_folder)
    known = read(training, training_image_folder or image_folder) if training else []
    result = ask(
        _assistant(options), questions, training=known, limit=limit, batch_size=batch_size, ask_first=ask_first
    )  # fmt: skip
    print_rows(result.table())
    if out:
        write_result(result, out)


COMMANDS = (chat, web, evaluate)

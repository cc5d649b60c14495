"""Commands about a trained model: chat, web, eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmft.cli.shared import loaded_plugins, print_rows

if TYPE_CHECKING:
    from mmft.inference import Assistant

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
        folder,
        loaded_plugins(),
        device=choose_device(device),
        quantization=quantization,
        llm=llm,
        chat_template=template,
    )


@click.command()
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


@click.command()
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


@click.command("eval")
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

    result = evaluate_files(_assistant(model, device, bits, llm, prompt_template), loaded_plugins(), **options)
    print_rows(result.table())
    if out:
        write_result(result, out)


COMMANDS = (chat, web, evaluate)

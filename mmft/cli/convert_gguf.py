"""`mmft convert gguf`: to llama.cpp, Ollama and what is built on them."""

from pathlib import Path

import click

from mmft.cli.shared import loaded_plugins


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--quant", default="f16", show_default=True, help="Of the weights: f32, f16, bf16, q8_0, q5_1 ... q4_0.")
@click.option("--square-only", is_flag=True, help="It will see square pictures alone, as llama.cpp pads others.")
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="fp32", show_default=True,
    help="In which the model is asked that the result is compared with; bf16 takes half the memory.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--llm", help="Where the base language model is now, if it moved.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def gguf(
    model: str, out: Path, quant: str, square_only: bool, dtype: str, device: str, llm: str | None, overwrite: bool
) -> None:
    """Write GGUF files and Ollama's Modelfile, and compare what llama.cpp answers with what was trained.

    MODEL is a run, a checkpoint or a model folder. OUT gets model-QUANT.gguf, for a model that sees mmproj-f16.gguf
    too, and a Modelfile for `ollama create NAME -f OUT/Modelfile`.

    bf16 and the types of 8 bits and fewer are written only after the same parts passed in f32 or f16, in files beside
    OUT that are gone afterwards.
    """
    from mmft.cli.convert import say
    from mmft.convert.gguf.export import export
    from mmft.convert.gguf.judge import Wish
    from mmft.inference import find_model
    from mmft.modeling.llm import choose_device

    wish = Wish(quant.lower(), square_only, dtype, llm, choose_device(device))
    say(export(find_model(model), out, loaded_plugins(), wish, overwrite=overwrite), out)


COMMANDS = (gguf,)

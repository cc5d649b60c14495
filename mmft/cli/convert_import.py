"""Commands that bring others' models here: `mmft convert import` and XTuner's `mmft convert pth_to_hf`."""

from pathlib import Path

import click

from mmft.cli.shared import loaded_plugins

PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
SET = click.option("--set", "settings", multiple=True, metavar="A.B.C=VALUE", help="Change one value of CONFIG.")
IGNORE_NAMES = click.option("--ignore-names", is_flag=True, help="SOURCE names other models, which are the same.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT, if `mmft convert` wrote it.")


@click.command("import")
@click.argument("source", metavar="SOURCE", type=PATH)
@click.argument("out", metavar="OUT", type=FOLDER)
@click.option("--for", "config", metavar="CONFIG", help="Hold it against the models of this config; OUT opens in chat.")
@SET
@click.option("--chat-template", metavar="NAME", help="Of a whole model (its own; vicuna for LLaVA's).")
@click.option("--vision-encoder", metavar="PATH", help="Where the encoder is that a LLaVA model names.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@IGNORE_NAMES
@OVERWRITE
def import_weights(
    source: Path,
    out: Path,
    config: str | None,
    settings: tuple[str, ...],
    chat_template: str | None,
    vision_encoder: str | None,
    device: str,
    ignore_names: bool,
    overwrite: bool,
) -> None:
    """Bring what LLaVA, XTuner, TinyLLaVA or transformers' LLaVA trained into the folder OUT.

    SOURCE is an mm_projector.bin, a LLaVA LoRA run (non_lora_trainables.bin and its adapter), a folder of XTuner's
    pth_to_hf (projector/, llm_adapter/, visual_encoder_adapter/), one of XTuner's .pth, a TinyLLaVA run, or a whole
    model, LLaVA-1.5's own or a llava-hf one: a folder, or a name on the hub. CONFIG is one of mmft or of XTuner; a
    whole model needs none.
    """
    from mmft.convert.importing.config import read_target
    from mmft.convert.importing.importers import bring
    from mmft.convert.importing.whole import bring_whole, found_source, is_whole
    from mmft.modeling.llm import choose_device

    plugins = loaded_plugins()
    source = found_source(source)
    if is_whole(source):
        if config:
            raise click.UsageError(f"{source} is a whole model and says itself what it is; leave --for out")
        lines = bring_whole(
            source, out, plugins=plugins, chat_template=chat_template, vision_encoder=vision_encoder,
            device=choose_device(device), overwrite=overwrite,
        )  # fmt: skip
    else:
        if chat_template or vision_encoder:
            raise click.UsageError("--chat-template and --vision-encoder are for whole models; CONFIG has both")
        target = read_target(config, plugins, settings) if config else None
        lines = bring(source, out, target=target, plugins=plugins, ignore_names=ignore_names, overwrite=overwrite)
    for line in lines:
        click.echo(line)


@click.command("pth_to_hf")
@click.argument("config", metavar="CONFIG")
@click.argument("checkpoint", metavar="CKPT", type=PATH)
@click.argument("out", metavar="OUT", type=FOLDER)
@SET
@IGNORE_NAMES
@OVERWRITE
def pth_to_hf(
    config: str, checkpoint: Path, out: Path, settings: tuple[str, ...], ignore_names: bool, overwrite: bool
) -> None:
    """Make a model folder of a training checkpoint.

    CKPT is a checkpoint of mmft, whatever engine wrote it, or XTuner's .pth: a file, or the folder DeepSpeed writes.
    CONFIG is the config it was trained with, mmft's or XTuner's; XTuner's is read, not run.
    """
    from mmft.convert.importing.config import read_target
    from mmft.convert.importing.importers import pth_to_hf as convert

    plugins = loaded_plugins()
    target = read_target(config, plugins, settings)
    for line in convert(
        checkpoint, out, target=target, plugins=plugins, ignore_names=ignore_names, overwrite=overwrite
    ):
        click.echo(line)


COMMANDS = (import_weights, pth_to_hf)

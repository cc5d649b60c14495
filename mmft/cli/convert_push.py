"""`mmft convert push`: a model to Hugging Face or ModelScope."""

from collections import Counter
from typing import Any

import click

HUBS = click.Choice(["huggingface", "modelscope"])


@click.command("push")
@click.argument("model")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--hub", type=HUBS, default="huggingface", show_default=True)
@click.option(
    "--dry-run", is_flag=True, help="Show the files and the card; upload nothing. Needs no network, no token."
)
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--branch", "--revision", help="Upload to this branch; it is made where it is not there.")
@click.option("--message", help="Of the commit.")
@click.option("--license", "license_id", metavar="ID", help="Such as apache-2.0, mit, llama3.1.")
@click.option("--language", metavar="zh,en", help="Languages it speaks, as two letters.")
@click.option(
    "--base-model", metavar="OWNER/NAME", help="The language model's name on the hub, where only a path is known."
)
@click.option("--base-vision", metavar="OWNER/NAME", help="The same for the vision encoder.")
@click.option("--run", metavar="RUN", help="The run that a converted folder came from: its data and metrics.")
@click.option("--unverified", is_flag=True, help="Push a conversion that was not verified; its card says so.")
@click.option("--overwrite-card", is_flag=True, help="Write a new card in the place of the README.md that is there.")
@click.option("--card-language", type=click.Choice(["en", "zh"]), default="en", show_default=True)
def push(model: str, repo: str, **options: Any) -> None:
    """Upload a model with a model card.

    MODEL is a run, a model folder, or what `mmft convert` made (hf, merge, gguf). Only what belongs to the model goes:
    no checkpoint, no optimizer state, no log, no samples. Paths of this machine are taken out of its JSON files; a
    README.md of your own or a Modelfile that has one is refused.
    """
    from mmft.convert.push.model_card import Wishes
    from mmft.convert.push.push import plan_push, send

    bases = {"llm": options["base_model"], "vision": options["base_vision"]}
    wishes = Wishes(
        license=options["license_id"],
        languages=tuple(part.strip() for part in (options["language"] or "").split(",") if part.strip()),
        bases={part: name for part, name in bases.items() if name},
        card_language=options["card_language"],
    )
    plan = plan_push(
        model, repo, options["hub"], wishes=wishes, run=options["run"], unverified=options["unverified"],
        overwrite_card=options["overwrite_card"],
    )  # fmt: skip
    for upload in plan.uploads:
        click.echo(f"{_size(upload.size):>9}  {upload.name}")
    click.echo(f"{_size(plan.size):>9}  in {len(plan.uploads)} files, to {options['hub']}: {repo}")
    for reason, count in Counter(plan.left_out.values()).items():
        first = next(name for name, why in plan.left_out.items() if why == reason)
        click.echo(f"stays here: {first}{f' and {count - 1} more' if count > 1 else ''} ({reason})")
    for note in plan.notes:
        click.echo(f"note: {note}")
    if options["dry_run"]:
        click.echo(f"\n{plan.card}\nnothing was uploaded (--dry-run)")
        return
    address = send(plan, private=options["private"], branch=options["branch"], message=options["message"])
    click.echo(f"uploaded: {address}")


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


COMMANDS = (push,)

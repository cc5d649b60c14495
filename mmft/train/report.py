"""What a person opens when a run is over, or while it goes on: report.html (one file, no network) and loss.png."""

import base64
import io
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmft.config import TrainConfig
from mmft.config.load import dump_config
from mmft.data.bad_samples import drop_from
from mmft.data.store import Drop
from mmft.modeling.build import TABLE_COLUMNS
from mmft.train.plot import draw, smoothed, training, validation
from mmft.train.progress import duration

log = logging.getLogger("mmft")
PACKAGES = ("mmft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")
MAX_DROPS = 20
MAX_COLUMNS = 5  # sample steps shown side by side


@dataclass(frozen=True)
class Facts:
    """What the report says beside the metrics."""

    config: TrainConfig
    modules: Sequence[tuple[str, ...]]
    data: str
    drops: Sequence[Drop]
    device: str


def write_report(facts: Facts, *, state: str) -> None:
    """Write report.html and loss.png into the run's folder, from what is on disk. Its failure never ends a run.

    `state` says how the run stands; while it begins with "running" the curves are drawn once, not for dark screens too.
    """
    try:
        _write(facts, state)
    except Exception as error:  # the weights are what counts; the run's files have everything the page shows
        log.warning("report.html could not be written: %s: %s", type(error).__name__, error)
        log.debug("its traceback", exc_info=True)


def _write(facts: Facts, state: str) -> None:
    import jinja2

    folder = facts.config.runtime.output_dir
    metrics = read_metrics(folder / "metrics.jsonl")
    plots = []
    if training(metrics):
        plots = [draw(metrics, dark=dark) for dark in (False, True)[: 1 if state.startswith("running") else 2]]
        (folder / "loss.png").write_bytes(plots[0])
    steps, samples = _samples(folder / "samples")
    drops, num_drops = _drops(folder / "dropped.jsonl", facts.drops)
    template = files("mmft.train").joinpath("report.html.jinja").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    html = page.render(
        name=folder.name,
        where=str(folder),
        state=state,
        cards=_cards(metrics),
        plots=[_data_url(plot) for plot in plots],
        datasets=_datasets(metrics),
        samples=samples,
        sample_steps=steps,
        columns=TABLE_COLUMNS,
        modules=facts.modules,
        data=facts.data,
        drops=drops,
        num_drops=num_drops,
        environment=[*((name, _version(name)) for name in PACKAGES), ("python", platform.python_version()),
                     ("device", facts.device), ("machine", platform.platform())],
        config=dump_config(facts.config),
    )  # fmt: skip
    (folder / "report.html").write_text(html, "utf-8", errors="replace")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _cards(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    steps, evaluated = training(metrics), validation(metrics)
    if not steps:
        return []
    last = steps[-1]
    rates = [line["tokens_per_second"] for line in steps[1:] or steps]
    now = smoothed([line["loss"] for line in steps])[-1]
    cards = [
        (f"{now:.4f}", f"loss, smoothed, at step {last['step']:,}"),
        (f"{steps[0]['loss']:.4f}", "loss at the start"),
    ]
    if evaluated:
        best = min(evaluated, key=lambda line: line["validation_loss"])
        cards.append((f"{best['validation_loss']:.4f}", f"best validation loss, at step {best['step']:,}"))
        cards.append((f"{best['perplexity']:,.2f}", "perplexity there"))
    return [
        *cards,
        (duration(last["seconds"]), "time"),
        (f"{sum(rates) / len(rates):,.0f}", "tokens a second"),
        (f"{last['memory_gb']:.2f} GB", "memory at its highest"),
    ]


def _datasets(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Number, data set, its last training and validation loss; empty where nothing is told by data set.

    The curves use the number where no font at hand can write the name.
    """
    trained: dict[str, float] = next((m["loss_by_dataset"] for m in reversed(metrics) if m.get("loss_by_dataset")), {})
    key = "validation_loss_by_dataset"
    evaluated: dict[str, float] = next((m[key] for m in reversed(metrics) if m.get(key)), {})
    rows = [(name, trained.get(name), evaluated.get(name)) for name in sorted({*trained, *evaluated})]
    return [
        (str(number), name, *("" if loss is None else f"{loss:.4f}" for loss in losses))
        for number, (name, *losses) in enumerate(rows, 1)
    ]


def _drops(path: Path, known: Sequence[Drop]) -> tuple[list[Drop], int]:
    """The first records that were not trained as given, and how many; dropped.jsonl has those found later too."""
    if not path.is_file():
        return list(known)[:MAX_DROPS], len(known)
    lines = [line for line in path.read_text("utf-8", errors="replace").splitlines() if line]
    return [drop_from(line) for line in lines[:MAX_DROPS]], len(lines)


def _samples(folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The answers of a few steps side by side: the first, the last and some between."""
    paths = sorted(folder.glob("step-*.json")) if folder.is_dir() else []
    if len(paths) > MAX_COLUMNS:
        spread = [round(i * (len(paths) - 1) / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)]
        paths = [paths[i] for i in spread]
    steps = [int(path.stem.rpartition("-")[2]) for path in paths]
    columns = [json.loads(path.read_text("utf-8")) for path in paths]
    rows = []
    for i, asked in enumerate(columns[-1] if columns else []):
        answers = [column[i] if i < len(column) else {"answer": ""} for column in columns]
        rows.append({"text": asked["text"], "images": [_thumbnail(p) for p in asked["images"]], "answers": answers})
    return steps, rows


def _thumbnail(path: str) -> str:
    """A data URL, or an empty string where the picture cannot be read (any more)."""
    from mmft.errors import DataError
    from mmft.images import open_image

    try:
        image = open_image(path)
    except (DataError, OSError):
        return ""
    image.thumbnail((240, 160))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _data_url(buffer.getvalue())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"

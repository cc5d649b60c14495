"""What a person opens when a run is over, or while it goes on: report.html (one file, no network) and loss.png."""

import base64
import io
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmft.config import TrainConfig
from mmft.config.load import dump_config
from mmft.data.store import Drop
from mmft.modeling.build import TABLE_COLUMNS
from mmft.train.callbacks import duration

PACKAGES = ("mmft", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
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
    """Write report.html and loss.png into the run's folder, from what is on disk."""
    import jinja2

    folder = facts.config.runtime.output_dir
    metrics = read_metrics(folder / "metrics.jsonl")
    plot = draw(metrics) if metrics else b""
    if plot:
        (folder / "loss.png").write_bytes(plot)
    steps, samples = _samples(folder / "samples")
    template = files("mmft.train").joinpath("report.html.jinja").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template)
    html = page.render(
        name=folder.name,
        where=str(folder),
        state=state,
        cards=_cards(metrics),
        plot=_data_url(plot) if plot else "",
        samples=samples,
        sample_steps=steps,
        columns=TABLE_COLUMNS,
        modules=facts.modules,
        data=facts.data,
        drops=list(facts.drops)[:MAX_DROPS],
        environment=[*((name, _version(name)) for name in PACKAGES), ("python", platform.python_version()),
                     ("device", facts.device), ("machine", platform.platform())],
        config=dump_config(facts.config),
    )  # fmt: skip
    (folder / "report.html").write_text(html, "utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _cards(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    if not metrics:
        return []
    last = metrics[-1]
    rates = [line["tokens_per_second"] for line in metrics[1:] or metrics]
    return [
        (f"{last['loss']:.4f}", f"loss at step {last['step']:,}"),
        (f"{metrics[0]['loss']:.4f}", "loss at the start"),
        (duration(last["seconds"]), "time"),
        (f"{sum(rates) / len(rates):,.0f}", "tokens a second"),
        (f"{last['memory_gb']:.2f} GB", "memory at its highest"),
    ]


def draw(metrics: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of loss (raw and smoothed), learning rate, gradient norm and throughput."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics]
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("loss", "loss"),
        ("learning rate", "lr"),
        ("gradient norm", "grad_norm"),
        ("tokens a second", "tokens_per_second"),
    )
    for axes, (title, key) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = [line.get(key) for line in metrics]
        axes.plot(steps, values, color="#9db7e8" if key == "loss" else "#2f6fde", linewidth=1.4)
        if key == "loss":
            axes.plot(steps, smoothed([line["loss"] for line in metrics]), color="#2f6fde", linewidth=2)
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, average = [], 0.0
    for n, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**n))
    return result


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
        answers = [column[i]["answer"] if i < len(column) else "" for column in columns]
        rows.append({"text": asked["text"], "images": [_thumbnail(p) for p in asked["images"]], "answers": answers})
    return steps, rows


def _thumbnail(path: str) -> str:
    from mmft.images import open_image

    image = open_image(path)
    image.thumbnail((160, 160))
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

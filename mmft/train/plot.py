"""The curves of a run as one PNG, for the report and as loss.png."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

BLUE, ORANGE, GREEN = "#3b7be8", "#d9730d", "#2e9e6b"
SERIES = (BLUE, ORANGE, GREEN, "#8a5cd6", "#c2416b", "#6b7280", "#0891b2", "#a16207")
LIGHT = {"back": "#ffffff", "ink": "#1c2330", "faint": "#667085"}
DARK = {"back": "#1a1f29", "ink": "#e6e9ef", "faint": "#98a2b3"}
CHINESE = ("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei")
MANY = 100  # points
Line = dict[str, Any]


def training(metrics: Sequence[Line]) -> list[Line]:
    """The lines of metrics.jsonl that a training step wrote."""
    return [line for line in metrics if "loss" in line]


def validation(metrics: Sequence[Line]) -> list[Line]:
    """The lines an evaluation wrote; one whose loss was not finite is left out."""
    return [line for line in metrics if line.get("validation_loss") is not None]


def draw(metrics: Sequence[Line], *, dark: bool = False) -> bytes:
    """A PNG: loss (raw, smoothed, validation), rate, gradient norm, throughput, memory, and loss by data set."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = DARK if dark else LIGHT
    steps = training(metrics)
    panels: list[Callable[[Any], None]] = [
        lambda axes: _loss(axes, steps, validation(metrics)),
        lambda axes: _lines(axes, "learning rate", steps, {"lr": ("", BLUE)}),
        lambda axes: _lines(axes, "gradient norm", steps, {"grad_norm": ("", BLUE)}),
        lambda axes: _lines(
            axes, "tokens a second", steps,
            {"tokens_per_second": ("all but padding", BLUE), "trained_tokens_per_second": ("trained", ORANGE)},
        ),
        lambda axes: _lines(axes, "memory at its highest, GB", steps, {"memory_gb": ("", BLUE)}),
    ]  # fmt: skip
    if any(line.get("images_per_second") for line in steps):
        panels.append(lambda axes: _lines(axes, "pictures a second", steps, {"images_per_second": ("", GREEN)}))
    for title, key, lines in (
        ("training loss by data set", "loss_by_dataset", steps),
        ("validation loss by data set", "validation_loss_by_dataset", validation(metrics)),
    ):
        if any(line.get(key) for line in lines):
            panels.append(partial(_by_dataset, title, key, lines))
    rows = -(-len(panels) // 2)
    with matplotlib.rc_context({"font.family": _fonts(), "text.color": colours["ink"], "axes.titlesize": 11}):
        height = 2.9 * rows
        figure = Figure(
            figsize=(11, height), facecolor=colours["back"]
        )  # a layout engine would take longer than drawing
        figure.subplots_adjust(0.055, 0.35 / height, 0.985, 1 - 0.35 / height, wspace=0.14, hspace=0.33)
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
            panel(axes)
            _dress(axes, colours)
        for axes in figure.axes[len(panels) :]:
            axes.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _loss(axes: Any, steps: Sequence[Line], evaluated: Sequence[Line]) -> None:
    numbers = [line["step"] for line in steps]
    losses = [_number(line["loss"]) for line in steps]
    axes.plot(numbers, losses, color=BLUE, alpha=0.35, linewidth=1.2, label="each log step")
    axes.plot(numbers, smoothed(losses), color=BLUE, linewidth=2, label="smoothed")
    if evaluated:
        values = [line["validation_loss"] for line in evaluated]
        axes.plot([line["step"] for line in evaluated], values, "o-", color=ORANGE, markersize=4, label="validation")
    axes.set_ylim(bottom=0)
    axes.set_title("loss", loc="left")
    axes.legend(frameon=False, fontsize=9)


def _lines(axes: Any, title: str, steps: Sequence[Line], keys: dict[str, tuple[str, str]]) -> None:
    for key, (label, colour) in keys.items():
        points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour, linewidth=1.4, label=label)
    axes.set_title(title, loc="left")
    if steps and not {"lr", "grad_norm"} & keys.keys():
        axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    if len(keys) > 1:
        axes.legend(frameon=False, fontsize=9)


def _by_dataset(title: str, key: str, lines: Sequence[Line], axes: Any) -> None:
    names = sorted({name for line in lines for name in line.get(key) or ()})
    drawable = any(font in CHINESE for font in _fonts())
    for number, (name, colour) in enumerate(zip(names, cycle(SERIES), strict=False), start=1):
        points = [(line["step"], line[key][name]) for line in lines if (line.get(key) or {}).get(name) is not None]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, marker="." if len(points) < MANY else "",
                  label=_short(name) if drawable or not _needs_chinese(name) else f"no. {number}")  # fmt: skip
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize=8)


def _needs_chinese(name: str) -> bool:
    return any(ord(character) >= 0x2E80 for character in name)


def _short(name: str, width: int = 28) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _dress(axes: Any, colours: dict[str, str]) -> None:
    axes.set_facecolor(colours["back"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours["faint"])
    axes.tick_params(colors=colours["faint"], labelsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if (legend := axes.get_legend()) is not None:
        for text in legend.get_texts():
            text.set_color(colours["ink"])


def _fonts() -> list[str]:
    """matplotlib's own font, and one with Chinese where the machine has it: a data set's name may need it."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CHINESE if name in installed)]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start; a value that is none leaves it where it was."""
    result, average, share = [], 0.0, 0.0
    for value in values:
        if value == value:
            average, share = weight * average + (1 - weight) * value, weight * share + 1 - weight
        result.append(average / share if share else float("nan"))
    return result

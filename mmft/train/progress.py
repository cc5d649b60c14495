"""How fast a run is, and how a person sees it: one progress line on a terminal, plain lines everywhere else."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

log = logging.getLogger("mmft")
FILE_ONLY = {"screen": False}  # `extra=` of a message that belongs into run.log and not on the screen
Gather = Callable[[torch.Tensor], torch.Tensor]  # [...] of this rank -> [ranks, ...]


class Pace:
    """Measures between two log lines: tokens (padding is none), trained tokens and pictures a second, time, memory.

    What happens inside `paused()`, an evaluation or a sample, is not training time.
    """

    def __init__(self) -> None:
        self.step = 0
        self.counts: tuple[int, ...] = (0, 0, 0)
        self.began = self.last = time.monotonic()
        self.idle = 0.0

    def begin(self, step: int = 0, seconds: float = 0.0) -> None:
        """Start the clock: everything is loaded, and the first samples are asked. `seconds` were trained before."""
        self.step = step
        self.last = time.monotonic()
        self.began, self.idle = self.last - seconds, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.idle += time.monotonic() - began

    def measure(
        self, step: int, max_steps: int, counts: Sequence[int], gather: Gather | None = None
    ) -> dict[str, float]:
        """What goes into a log line. `counts` are tokens, trained tokens, pictures so far; `gather`: of all ranks."""
        now = time.monotonic()
        seconds = max(now - self.last - self.idle, 1e-9)
        new = [float(after - before) for after, before in zip(counts, self.counts, strict=True)]
        memory = peak_memory()
        if gather is not None:
            everyone = gather(torch.tensor([*new, memory], dtype=torch.float64))
            new, memory = everyone[:, :3].sum(0).tolist(), float(everyone[:, 3].max())
        left = (max_steps - step) * seconds / max(1, step - self.step)
        self.step, self.counts, self.last, self.idle = step, tuple(counts), now, 0.0
        return {
            "tokens_per_second": round(new[0] / seconds, 1),
            "trained_tokens_per_second": round(new[1] / seconds, 1),
            "images_per_second": round(new[2] / seconds, 2),
            "seconds": round(now - self.began, 2),
            "seconds_left": round(left, 1),
            "memory_gb": round(memory, 3),
        }


class DatasetLoss:
    """The token mean of each dataset's training loss between two log lines, from what the model adds up anyway."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.sums: torch.Tensor | None = None

    def add(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Take a forward pass's "dataset_sums" float[2, D]. Nothing waits for the GPU."""
        if (sums := outputs.get("dataset_sums")) is not None:
            self.sums = sums.double() if self.sums is None else self.sums + sums

    def means(self, gather: Gather | None = None) -> dict[str, float]:
        """`{"loss/a": ...}` since the last call, of all ranks; a dataset that did not come is left out."""
        if self.sums is None:
            return {}
        sums = self.sums.cpu() if gather is None else gather(self.sums).sum(0)
        self.sums = None
        found = zip(self.names, sums[0].tolist(), sums[1].tolist(), strict=True)
        return {f"loss/{name}": loss / targets for name, loss, targets in found if targets}


def peak_memory() -> float:
    """GB: of the GPU where there is one, else the resident memory of this process at its highest."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def duration(seconds: float) -> str:
    """`2:05`, or `1:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def described(line: dict[str, Any]) -> str:
    """A line of metrics.jsonl in words, without its step."""
    if "validation_loss" in line:
        return f"validation loss {line['validation_loss']:.4f}, perplexity {line['perplexity']:.2f}"
    images = f", {line['images_per_second']:.1f} images/s" if line["images_per_second"] else ""
    return (
        f"loss {line['loss']:.4f}  lr {line['lr'] or 0.0:.2e}  {line['tokens_per_second']:,.0f} tokens/s "
        f"({line['trained_tokens_per_second']:,.0f} trained{images})  {line['memory_gb']:.2f} GB"
    )


class Progress(TrainerCallback):  # type: ignore[misc]
    """The screen. On a terminal a bar that says where the run is, messages above it; else a plain line a log step.

    `console` is for tests; rich decides whether it is a terminal (NO_COLOR, TERM=dumb and a pipe are respected).
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self._console = console or Console()
        self._bar: Any = None
        self._task: Any = None
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While training: whatever happens, the terminal is left as it was."""
        try:
            yield
        finally:
            self.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar."""
        if not (self._console.is_terminal and not self._console.is_dumb_terminal and state.is_world_process_zero):
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[told]}"),
            console=self._console, transient=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, told="")
        self._bar.start()
        for handler in log.handlers:  # the bar redraws itself below what is written through the console
            if type(handler) is logging.StreamHandler:
                self._moved.append((handler, handler.stream))
                handler.setStream(_Lines(self._console))
                handler.addFilter(_for_screen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One further."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def tell(self, line: dict[str, Any], max_steps: int) -> None:
        """Show a line of metrics.jsonl; it is in run.log either way."""
        left = f"  {duration(line['seconds_left'])} left" if "seconds_left" in line else ""
        text = described(line) + left
        on_bar = self._bar is not None and "loss" in line
        if on_bar:
            self._bar.update(self._task, told=text)
        log.info("step %d/%d  %s", line["step"], max_steps, text, extra=FILE_ONLY if on_bar else None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last state on the screen."""
        self.close()

    def close(self) -> None:
        """Stop drawing; a second call does nothing."""
        if self._bar is None:
            return
        self._bar.stop()
        self._bar = None
        for handler, stream in self._moved:
            handler.setStream(stream)
            handler.removeFilter(_for_screen)
        self._moved.clear()


def _for_screen(record: logging.LogRecord) -> bool:
    return bool(getattr(record, "screen", True))


class _Lines:
    """A text stream that writes through a rich console, as plain text."""

    def __init__(self, console: Any) -> None:
        self._console = console

    def write(self, text: str) -> None:
        """Messages come whole, with their newline."""
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is held back."""

"""`mmft plan` from a config to what a person reads: read `make_report` first."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mmft.config import TrainConfig
from mmft.config.check import check_config
from mmft.config.load import override
from mmft.data.shape import describe_model
from mmft.errors import MmftError
from mmft.plan.advice import MAX_BATCH, Change, changes, largest_batch, together
from mmft.plan.memory import Memory, Planner
from mmft.plan.probe import Measured, probe
from mmft.plan.simulate import BatchShape
from mmft.plan.skeleton import Target
from mmft.plan.steps import read_data
from mmft.plugins import Plugins

GIB = 2**30
# Of the estimate. On a CPU it was up to 3.7 % too low with peaks from 1 GB on; no GPU was there (docs/benchmarks.md)
MARGIN = 0.10
# The estimate counts what is alive: see mmft.plan.probe
ALLOCATOR = (
    "note: glibc keeps freed blocks, so a run may hold up to twice its tensors; MALLOC_MMAP_THRESHOLD_=131072 in its "
    "environment has them handed back"
)
UNITS = {"": GIB, "g": GIB, "m": 2**20, "t": 2**40}


@dataclass(frozen=True)
class Report:
    """All that was found out; bytes and seconds."""

    target: Target
    limit: int
    device: str
    memory: Memory
    largest: tuple[BatchShape, ...]
    micro_batch: int
    fitting_batch: int
    changes: tuple[Change, ...]
    together: Change | None
    steps_per_epoch: int
    steps: int
    tokens_per_epoch: int
    data: str
    accumulate: int = 1
    processes: int = 1
    measured: Measured | None = None
    num_rows: int = 0  # samples, or packed rows, that were looked at
    compared: int | None = None  # the estimate for what was measured: one process, on the device it ran on

    @property
    def fits(self) -> bool:
        """Whether the estimated peak fits with the margin: what a script may rely on."""
        return self.memory.total <= safe(self.limit)

    @property
    def verdict(self) -> str:
        """`fits`, `fits closely` (within the margin: the estimate's error decides) or `does not fit`."""
        if self.fits:
            return "fits"
        return "fits closely" if self.memory.total <= self.limit else "does not fit"

    @property
    def error(self) -> float | None:
        """(estimate - measured) / measured, of what torch needs beyond its libraries."""
        return self.compared / self.measured.peak - 1 if self.measured and self.compared else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the probe's batch."""
        return self.measured.tokens * self.accumulate / self.measured.seconds if self.measured else None

    @property
    def seconds_per_epoch(self) -> float | None:
        """At the speed of the probe's batch."""
        return self.tokens_per_epoch / self.tokens_per_second if self.tokens_per_second else None


def make_report(
    config: TrainConfig, plugins: Plugins, *, gpu: str | None = None, with_probe: bool = False,
    modules: tuple[str, ...] = (), advise: bool = True, processes: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Report:  # fmt: skip
    """Estimate, look for what fits, and measure where asked to. Raises `ConfigError` for a config that cannot train.

    `say` is told what is being done whenever the next seconds go into something else.
    """
    say("reading the model's configuration and the data")
    check_config(config, plugins)
    target, limit, device = where_it_runs(config, gpu)
    shape = describe_model(config.model, plugins)
    plan = read_data(config, plugins, shape, whole=with_probe)
    planner = Planner(plugins, shape, target, processes)
    size = config.optim.batch_size_per_device
    shapes = plan.batches(size)
    say(f"simulating a step with the largest batch of {size}")
    memory = planner.estimate(config, shapes)
    fitting = largest_batch(planner, plan, safe(limit), say) if advise else 0
    found = changes(planner, plan, memory, say) if advise and memory.total > safe(limit) else []
    world = max(1, processes // config.runtime.sequence_parallel)  # who share a row see the same one
    if with_probe:
        say("running two steps")
    measured = probe(config, modules) if with_probe else None
    return Report(
        target, limit, device, memory, tuple(shapes), size, fitting, tuple(found),
        together(planner, plan, found, safe(limit)) if found else None,
        plan.steps_per_epoch(world), plan.steps(world), plan.tokens_per_epoch, plan.source,
        config.optim.accumulate, processes, measured, len(plan.dataset), _compared(planner, config, shapes, measured),
    )  # fmt: skip


def safe(limit: int) -> int:
    """The largest estimate that fits with the margin."""
    return int(limit / (1 + MARGIN))


def _compared(planner: Planner, config: TrainConfig, shapes: list[BatchShape], measured: Measured | None) -> int | None:
    """The estimate for what was probed: one process without an engine, where it ran and not where it is planned."""
    if measured is None:
        return None
    target: Target = "cuda" if measured.device == "cuda" else "cpu"
    alone = override(config, {"runtime.deepspeed": None, "runtime.fsdp": False})
    return Planner(planner.plugins, planner.shape, target).estimate(alone, shapes).without_runtime


def where_it_runs(config: TrainConfig, gpu: str | None) -> tuple[Target, int, str]:
    """(kind, bytes, name): the card asked for, else the one that is here, else this machine's memory."""
    if gpu:
        size = parse_size(gpu)
        return "cuda", size, "a card"
    if config.runtime.device != "cpu" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return "cuda", found.total_memory, found.name
    return "cpu", memory_of_machine(), "this machine's memory"


def parse_size(text: str) -> int:
    """`8GB`, `8GiB`, `24g`, `512MB` -> bytes; a card of "8 GB" has 8 GiB. Raises `MmftError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([gmt]?)(?:i?b)?", text.strip().lower())
    if not found or float(found[1]) == 0:
        raise MmftError(f"--gpu {text}: not a size; write 8GB, 24GB or 512MB")
    return int(float(found[1]) * UNITS[found[2]])


def memory_of_machine() -> int:
    """Bytes of RAM."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def as_json(report: Report) -> dict[str, Any]:
    """Plain data, with what the properties say."""
    told = asdict(report)
    told["memory"] |= {"total": report.memory.total, "without_runtime": report.memory.without_runtime}
    told["changes"] = [{**asdict(change), "command": str(change)} for change in report.changes]
    return {
        **told, "fits": report.fits, "verdict": report.verdict, "margin": MARGIN, "error": report.error,
        "seconds_per_epoch": report.seconds_per_epoch,
    }  # fmt: skip


def lines_of(report: Report) -> Iterator[str]:
    """The report as text."""
    memory = report.memory
    width = max(len(part) for part in memory.parts)
    batch = report.largest[0]
    pictures = f", {batch.num_images} pictures" if batch.num_images else ""
    yield (
        f"largest batch: {len(batch.lengths)} sample(s), {batch.num_tokens:,} tokens, {batch.num_labels:,} of them "
        f"targets{pictures} ({report.data})"
    )
    for part, size in memory.parts.items():
        name = part.removesuffix(" weights")
        counted = f"  {memory.parameters[name]:,} parameters, {memory.trained[name]:,} trained" if name != part else ""
        yield f"  {part.ljust(width)}  {_gib(size)}{counted}"
    yield f"  {'peak'.ljust(width)}  {_gib(memory.total)}"
    if memory.ram:
        held = ", ".join(f"{part} {_size(size)}" for part, size in memory.ram.items())
        yield f"and in RAM, all processes together: {held}"
    yield from (f"note: {note}" for note in memory.notes)
    yield _verdict_line(report)
    if report.target == "cpu":
        yield ALLOCATOR
    if report.fitting_batch:
        yield f"largest optim.batch_size_per_device that fits: {report.fitting_batch}{_why_not_more(report)}"
    elif not report.fits:
        yield "not even one sample at a time fits as it is, with the margin"
    for change in report.changes:
        left = "fits" if change.total <= safe(report.limit) else "not enough alone"
        yield f"  saves {_size(change.saved)}: {change}  ({change.why}; {left})"
    if report.changes and not any(change.total <= safe(report.limit) for change in report.changes):
        both = report.together
        yield (
            f"  together they fit, at {_size(both.total)}: {both}"
            if both
            else "  all of these together do not fit; take a smaller model, or several GPUs with DeepSpeed ZeRO-3"
        )
    yield (
        f"{report.steps:,} optimizer steps, {report.steps_per_epoch:,} an epoch of {report.tokens_per_epoch:,} tokens, "
        f"{report.tokens_per_epoch // max(1, report.steps_per_epoch):,} a step"
    )
    yield from _measured_lines(report)


def _why_not_more(report: Report) -> str:
    if report.fitting_batch == report.num_rows:
        return f" (the data has only {report.num_rows} {'row' if report.num_rows == 1 else 'rows'})"
    return " (larger ones were not looked at)" if report.fitting_batch == MAX_BATCH else ""


def _measured_lines(report: Report) -> Iterator[str]:
    measured = report.measured
    if measured is None:
        yield "time: not known without running it; --probe runs two steps"
        return
    error, estimate = report.error or 0.0, report.compared or 0
    yield (
        f"measured peak, libraries not counted: {_size(measured.peak)} in one process on {measured.device}; estimated "
        f"for that: {_size(estimate)}, {error:+.1%}"
    )
    if measured.loading > measured.peak:
        yield f"loading the model takes more for a moment: {_size(measured.loading)}"
    yield (
        f"measured on the largest batch, on {measured.device}: {measured.seconds:.1f} s a step, "
        f"{report.tokens_per_second or 0:,.0f} tokens a second; "
        f"an epoch takes about {(report.seconds_per_epoch or 0) / 60:,.1f} min"
    )


def _verdict_line(report: Report) -> str:
    total, where = report.memory.total, f"{report.device} ({_size(report.limit)})"
    if report.verdict == "fits":
        return f"fits {where} with a margin of {MARGIN:.0%}"
    if report.verdict == "fits closely":
        left = report.limit - total
        return f"fits closely: {_size(left)} left of {where}, less than the margin of {MARGIN:.0%}; --probe there tells"
    return f"does not fit {where}: {_size(total - report.limit)} too much"


def _size(size: int) -> str:
    return _gib(size).strip()


def _gib(size: int) -> str:
    return f"{size / 2**20:8.1f} MiB" if size < GIB else f"{size / GIB:8.2f} GiB"

"""What fits: the largest micro-batch, and what each change of a config that does not fit would save."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mmft.config import TrainConfig
from mmft.config.check_engine import engine_problems
from mmft.config.load import override
from mmft.plan.memory import Memory, Planner
from mmft.plan.simulate import BatchShape
from mmft.plan.steps import Plan

MAX_BATCH = 256
TRIES = 6  # simulations after the first
CLOSE = 1.03  # a batch larger by less than this is not looked for
EIGHT_BIT = "paged_adamw_8bit"
ENGINES = {  # shipped names: what each does with what the trained weights need
    "zero2": "the processes share gradients and optimizer",
    "zero3": "the processes share gradients, optimizer and weights",
    "zero2_offload": "gradients and optimizer in RAM, slower",
    "zero3_offload": "gradients, optimizer and weights in RAM, much slower",
}


@dataclass(frozen=True)
class Change:
    """One change as `--set` writes it, and the peak it leads to."""

    settings: dict[str, Any]
    total: int
    saved: int
    why: str = ""

    def __str__(self) -> str:
        return " ".join(f"--set {path}={_text(value)}" for path, value in self.settings.items())


def largest_batch(planner: Planner, plan: Plan, limit: int, say: Callable[[str], None] = lambda text: None) -> int:
    """The largest micro-batch whose largest batch is known to fit; 0 where not even one sample does.

    Memory grows by nearly the same amount with each token, so a line through two estimates says where to look next. A
    simulation takes seconds, so after `TRIES` of them the largest that fitted is the answer; `say` is told of each.
    """
    most = min(MAX_BATCH, len(plan.dataset))

    @cache
    def tokens(size: int) -> int:
        return plan.batches(size)[0].num_tokens

    def total(size: int) -> int:
        say(f"looking for the largest batch that fits: simulating one of {size}")
        return planner.estimate(plan.config, plan.batches(size)).total

    fitting, known = 0, {1: total(1)}
    if known[1] > limit:
        return 0
    fitting, too_large = 1, most + 1
    for _ in range(TRIES):
        if too_large - fitting <= 1:
            break
        size = 2 if len(known) == 1 else _next_size(known, tokens, fitting, too_large, limit)
        if size > 2 and size <= CLOSE * fitting:
            break
        known[size] = total(size)
        fitting, too_large = (size, too_large) if known[size] <= limit else (fitting, size)
    return fitting


def _next_size(known: Mapping[int, int], tokens: Callable[[int], int], fitting: int, too_large: int, limit: int) -> int:
    """The largest batch between two sizes that fits by the line through the known sizes closest to them."""
    ends = sorted(known, key=lambda size: min(abs(size - fitting), abs(size - too_large)))[:2]
    low, high = sorted(ends)
    by_token = (known[high] - known[low]) / max(1, tokens(high) - tokens(low))
    inside = range(fitting + 1, too_large)
    by_size = bisect_right(inside, limit, key=lambda size: int(known[low] + by_token * (tokens(size) - tokens(low))))
    return inside[max(0, by_size - 1)]


def changes(
    planner: Planner, plan: Plan, memory: Memory, say: Callable[[str], None] = lambda text: None
) -> list[Change]:
    """Each change that saves something, the one that saves most first."""
    found = []
    for settings, batches, why in (*_candidates(plan), *_engines(planner, plan)):
        changed = override(plan.config, settings)
        if not _can_be(planner, changed):
            continue
        say(f"what would {Change(settings, 0, 0)} save")
        total = planner.estimate(changed, batches).total
        if total < memory.total:
            found.append(Change(settings, total, memory.total - total, why))
    return sorted(found, key=lambda change: -change.saved)


def _candidates(plan: Plan) -> Iterator[tuple[dict[str, Any], list[BatchShape], str]]:
    config, batch = plan.config, plan.config.optim.batch_size_per_device
    llm, batches = config.model.llm, plan.batches(batch)
    if llm.quantization == "none" and not llm.trainable:
        yield {"model.llm.quantization": "nf4"}, batches, "a frozen model in 4 bits"
    if llm.trainable:
        change = {"model.llm.trainable": False, "model.llm.lora": {"r": 64}, "model.llm.quantization": "nf4"}
        yield change, batches, "QLoRA: an adapter on a frozen model in 4 bits"
    if not config.runtime.gradient_checkpointing:
        yield {"runtime.gradient_checkpointing": True}, batches, "computes each layer twice, about a third slower"
    if batch > 1:
        smaller, accumulate = batch // 2, -(-config.optim.accumulate * batch // (batch // 2))
        change = {"optim.batch_size_per_device": smaller, "optim.accumulate": accumulate}
        yield change, plan.batches(smaller), "the same optimizer step in more pieces"
    if config.optim.optimizer.startswith("adamw_torch"):
        yield {"optim.optimizer": EIGHT_BIT}, batches, "optimizer states in 8 bits"
    if llm.lora and llm.lora.r > 8:
        yield {"model.llm.lora.r": llm.lora.r // 4}, batches, "a smaller adapter learns less"
    longest = max((length for shape in batches for length in shape.lengths), default=0)
    if plan.config.data.packing or longest > 256:
        half = config.data.max_length // 2 if config.data.packing else longest // 2
        yield {"data.max_length": half}, [_shorter(shape, half, config) for shape in batches], "longer samples are cut"


def _engines(planner: Planner, plan: Plan) -> Iterator[tuple[dict[str, Any], list[BatchShape], str]]:
    """DeepSpeed's stages. A single process has nobody to share with, but it has RAM."""
    runtime, batches = plan.config.runtime, plan.batches(plan.config.optim.batch_size_per_device)
    if planner.target == "cpu" or runtime.fsdp:
        return
    for name, why in ENGINES.items():
        if name != runtime.deepspeed and (planner.processes > 1 or name.endswith("offload")):
            yield {"runtime.deepspeed": name}, batches, why


def _can_be(planner: Planner, config: TrainConfig) -> bool:
    """Whether the engine takes this model; that it is not installed here says nothing about the machine planned for."""
    return all("not installed" in problem.what for problem in engine_problems(config, planner.plugins))


def _shorter(shape: BatchShape, limit: int, config: TrainConfig) -> BatchShape:
    """The same batch of samples, or of packed rows, of at most `limit` tokens."""
    lengths, room = [], limit * config.optim.batch_size_per_device
    for length in shape.lengths:
        kept = min(length, limit, room if config.data.packing else length)
        room -= kept
        if kept:
            lengths.append(kept)
    share = sum(lengths) / max(1, shape.num_tokens)
    images = round(shape.num_images * share) if config.data.packing else shape.num_images
    return BatchShape(tuple(lengths), max(1, round(shape.num_labels * share)), images)


def together(planner: Planner, plan: Plan, found: list[Change], limit: int) -> Change | None:
    """The first changes, in their order, that fit when made together; None where all of them do not.

    A shorter `max_length` loses text and a smaller adapter learning, so they come last, whatever they save.
    """
    costly = ("data.max_length", "model.llm.lora.r")
    settings: dict[str, Any] = {}
    for change in sorted(found, key=lambda one: any(path in costly for path in one.settings)):
        both = change.settings | settings  # of two values for one thing, the one that saves more
        if ("model.llm.lora" in settings and "model.llm.lora.r" in change.settings) or both == settings:
            continue
        config = override(plan.config, both)
        if not _can_be(planner, config):
            continue
        settings = both
        batches = plan.batches(config.optim.batch_size_per_device)
        if "data.max_length" in settings:
            batches = [_shorter(shape, config.data.max_length, config) for shape in batches]
        total = planner.estimate(config, batches).total
        if total <= limit:
            return Change(settings, total, 0)
    return None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")

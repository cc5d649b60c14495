"""Peak memory of a run by part, from configurations alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn

from mmft.config import TrainConfig
from mmft.data.shape import Shape
from mmft.modeling.llm import compute_dtype
from mmft.modeling.loss import tokens_at_once
from mmft.plan.shards import Shards, shards_of
from mmft.plan.simulate import BatchShape, StepBytes, simulate
from mmft.plan.skeleton import QuantizedLinear, Skeleton, Target, build_skeleton
from mmft.plugins import Plugins

# CUDA's context, cuBLAS' workspaces and what the caching allocator loses; a guess: no GPU was at hand to measure it
CUDA_RUNTIME = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes by part; `total` is their sum, the peak of a step. `parameters` and `trained` count by model part."""

    parts: dict[str, int]
    parameters: dict[str, int]
    trained: dict[str, int]
    notes: tuple[str, ...] = ()
    ram: dict[str, int] = field(default_factory=dict)  # of all processes together, where an engine offloads
    step: StepBytes | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())

    @property
    def without_runtime(self) -> int:
        """What torch allocates: to be compared with `torch.cuda.max_memory_allocated`."""
        return self.total - self.parts["runtime"]


class Planner:
    """Estimates for one process of a config and its variants; a skeleton is made once for all that share a model."""

    def __init__(self, plugins: Plugins, shape: Shape, target: Target, processes: int = 1) -> None:
        self.plugins, self.shape, self.target, self.processes = plugins, shape, target, processes
        self._skeletons: dict[str, Skeleton] = {}
        self._estimates: dict[tuple[str, tuple[BatchShape, ...]], Memory] = {}

    def estimate(self, config: TrainConfig, batches: Sequence[BatchShape]) -> Memory:
        """The peak of the worst of some batches. Raises `ModelError` where a part has no readable configuration."""
        key = config.model_dump_json(), tuple(batches)
        if key not in self._estimates:
            self._estimates[key] = self._estimate(config, batches)
        return self._estimates[key]

    def _estimate(self, config: TrainConfig, batches: Sequence[BatchShape]) -> Memory:
        shards, dtype = shards_of(config, self.plugins, self.processes), self.dtype(config)
        skeleton = self._skeleton(config, cast_trained=shards.casts)
        words = next(skeleton.model.get_input_embeddings().parameters()).shape[0]
        skeleton.model.loss_piece = None if shards.deepspeed and shards.stage == 3 else tokens_at_once(words)
        step = simulate(
            skeleton, config, batches, self.shape.tokenizer.tokens_per_image, self.target,
            shards_gradients=shards.stage > 1,
        )  # fmt: skip
        weights: dict[str, int] = {}
        parameters, trained = {}, {}
        for name, module in skeleton.model.parts().items():
            own, adapters = _weight_bytes(module, 4 if shards.fsdp else None)
            weights |= {f"{name} weights": own} | ({f"{name} LoRA": adapters} if adapters else {})
            parameters[name] = sum(p.numel() for p in module.parameters())
            trained[name] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        masters = shards.deepspeed and (shards.stage > 0 or dtype is not torch.float32)
        parts, ram = _shared(shards, weights, step, sum(trained.values()), masters=masters)
        width = next(skeleton.model.get_input_embeddings().parameters()).shape[1]
        if gathered := shards.gathered(skeleton.model, width, dtype):
            parts["communication"] = gathered
        update = 0 if shards.optimizer_in_ram else step.update // shards.share(1)
        parts["activations and workspace"] = max(step.working, update)
        parts["runtime"] = runtime_bytes(self.target)
        return Memory(parts, parameters, trained, (*skeleton.notes, *_notes(config, shards)), ram, step)

    def _skeleton(self, config: TrainConfig, *, cast_trained: bool = False) -> Skeleton:
        runtime = config.runtime
        key = f"{config.model.model_dump_json()} {runtime.gradient_checkpointing} {runtime.precision} {cast_trained}"
        if key not in self._skeletons:
            self._skeletons[key] = build_skeleton(
                config, self.plugins, info=self.shape.vision, image_id=self.shape.tokenizer.image_id,
                dtype=self.dtype(config), target=self.target, cast_trained=cast_trained,
            )  # fmt: skip
        return self._skeletons[key]

    def dtype(self, config: TrainConfig) -> torch.dtype:
        """What the run computes in; on another machine's GPU `auto` is taken for bf16."""
        if self.target == "cuda" and config.runtime.precision == "auto":
            return torch.bfloat16
        return compute_dtype(config.runtime.precision, torch.device("cpu"))


def _shared(
    shards: Shards, weights: dict[str, int], step: StepBytes, trained: int, *, masters: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """(what one process keeps on its device, what all of them keep in RAM)."""
    ram: dict[str, int] = {}
    parts = {name: size // shards.share(3) for name, size in weights.items()}
    if shards.weights_in_ram:
        ram["weights"] = sum(weights.values())
        parts = dict.fromkeys(parts, 0)
    gradients = 4 * trained if shards.fsdp else step.gradients
    optimizer = step.optimizer + (4 * trained if masters else 0)
    if shards.optimizer_in_ram:
        ram["optimizer"] = optimizer
        if shards.stage > 1:
            ram["gradients"], gradients = 4 * trained, 0  # a float32 copy for the optimizer there
        optimizer = 0
    return parts | {"gradients": gradients // shards.share(2), "optimizer": optimizer // shards.share(1)}, ram


def _notes(config: TrainConfig, shards: Shards) -> Iterator[str]:
    if shards.processes > 1 or shards.stage:
        paper = "by the ZeRO paper's formulas (https://arxiv.org/abs/1910.02054, section 3)"
        how = f"share out {paper}" if shards.stage else "share out nothing"
        yield f"for each of {shards.processes} process(es) of {shards.name}, which {how}; held against no measurement"
    if config.runtime.sequence_parallel > 1:
        yield "runtime.sequence_parallel: activations are those of whole rows; each process has about its share of them"


def _weight_bytes(module: nn.Module, trained_size: int | None) -> tuple[int, int]:
    """(bytes of the part's own weights, bytes of its LoRA) as they are stored, trained ones in `trained_size` bytes."""
    stored = {id(layer.weight): layer.stored for layer in module.modules() if isinstance(layer, QuantizedLinear)}
    own = adapters = 0
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        each = trained_size if trained_size and tensor.requires_grad else tensor.element_size()
        size = stored.get(id(tensor), tensor.numel() * each)
        if ".lora_" in name:
            adapters += size
        else:
            own += size
    return own, adapters


@lru_cache
def runtime_bytes(target: Target) -> int:
    """What Python and its libraries take: on a CPU what this process, which has loaded them, takes now."""
    return CUDA_RUNTIME if target == "cuda" else resident_bytes()


def resident_bytes(line: str = "VmRSS") -> int:
    """Resident memory of this process, or its peak (`VmHWM`), from Linux; 0 where there is no /proc."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123  # not a file of ours
            found = next((text for text in file if text.startswith(line)), "0 0")
    except OSError:
        return 0
    return 1024 * int(found.split()[1])

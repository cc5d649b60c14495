"""What several processes share out, by the formulas of the ZeRO paper (https://arxiv.org/abs/1910.02054, section 3).

Each of N processes keeps 1/N of the optimizer's states from stage 1 on, of the gradients from stage 2 on, of the
weights in stage 3. FSDP2 shares out what stage 3 does. Plain DDP shares out nothing and copies every gradient once.
Under DeepSpeed in bf16 or fp16 the trained weights and their gradients are kept in that dtype, with a float32 master
copy beside the optimizer's states (the paper's K = 12 bytes a weight for Adam).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmft.config import TrainConfig
from mmft.config.check_engine import read_deepspeed, zero_stage
from mmft.plugins import Plugins
from mmft.train.engine import blocks

# DeepSpeed's own defaults, in weights: https://www.deepspeed.ai/docs/config-json/
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
RAM = "cpu"  # DeepSpeed's name of it


@dataclass(frozen=True)
class Shards:
    """One engine over some processes. Sizes of buckets and of what is gathered at once are in weights, not bytes."""

    name: str
    processes: int
    stage: int = 0
    deepspeed: bool = False
    optimizer_in_ram: bool = False
    weights_in_ram: bool = False
    reduce_bucket: int | None = 0  # None: the square of the model's width, as `auto` is filled in
    buckets: int = 1
    max_live: int | None = None  # None: block by block

    @property
    def casts(self) -> bool:
        """Whether weights are computed with in the run's dtype as they are, so that autocast copies none."""
        return self.deepspeed or self.stage == 3

    @property
    def fsdp(self) -> bool:
        """Whether it is FSDP2, whose shares are float32 whatever is computed with."""
        return self.stage == 3 and not self.deepspeed

    def share(self, stage: int) -> int:
        """By what to divide something that is shared out from this stage on."""
        return self.processes if self.stage >= stage else 1

    def gathered(self, model: nn.Module, width: int, dtype: torch.dtype) -> int:
        """Bytes that are there whole, or on their way, beside this process' shares."""
        size, trained = dtype.itemsize, sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not self.deepspeed:
            if self.fsdp:
                return _block_by_block(model, dtype)
            # DistributedDataParallel copies gradients into flat buckets (gradient_as_bucket_view is off)
            return 4 * trained if self.processes > 1 else 0
        bucket = max(width * width, 1 << 20) if self.reduce_bucket is None else self.reduce_bucket
        moving = bucket * self.buckets * size if self.stage else 0
        if self.stage < 3:
            return moving
        return moving + size * min(sum(p.numel() for p in model.parameters()), self.max_live or MAX_LIVE)


def shards_of(config: TrainConfig, plugins: Plugins, processes: int = 1) -> Shards:
    """What the config's engine shares out. Raises `ConfigError` for a DeepSpeed config that there is not."""
    runtime = config.runtime
    if runtime.fsdp:
        return Shards("FSDP2", processes, 3)
    if not runtime.deepspeed:
        return Shards("DDP" if processes > 1 else "one process", processes)
    content = read_deepspeed(runtime.deepspeed, plugins)
    stage, section = zero_stage(content), content.get("zero_optimization") or {}
    weights, optimizer = _in_ram(section, "offload_param"), _in_ram(section, "offload_optimizer")
    name = f"DeepSpeed ZeRO-{stage}" + (" with offload" if weights or optimizer else "")
    return Shards(
        name, processes, stage, True, optimizer and stage > 0, weights and stage == 3,
        _number(section.get("reduce_bucket_size", REDUCE_BUCKET)), 2 if section.get("overlap_comm") else 1,
        _number(section.get("stage3_max_live_parameters", MAX_LIVE)),
    )  # fmt: skip


def _in_ram(section: dict[str, Any], key: str) -> bool:
    return (section.get(key) or {}).get("device") == RAM


def _number(value: Any) -> int | None:
    return None if value == "auto" else int(value)


def _block_by_block(model: nn.Module, dtype: torch.dtype) -> int:
    """FSDP2: what is in no block stays whole, and with a block there are the next one and this one's gradients."""
    size, repeated = dtype.itemsize, list(blocks(model))
    inside = {id(p) for block in repeated for p in block.parameters()}
    root = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    largest = max(repeated, key=_numel, default=None)
    if largest is None:
        return root * size
    trained = sum(p.numel() for p in largest.parameters() if p.requires_grad)
    return (root + 2 * _numel(largest)) * size + trained * (size + 4)  # reduced in float32


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

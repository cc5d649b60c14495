"""What carries a run over its processes: plain DDP, DeepSpeed, or FSDP2. Each says how it shards, saves and resumes.

Trained weights are always saved as our own parts, whole, whatever the engine: every program can read them, and any
engine can start from them. The optimizer's state is the engine's own, and only the same engine over the same number of
processes goes on from it.
"""

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmft.config import TrainConfig
from mmft.config.check_engine import HEADS, read_deepspeed, uneven_heads, zero_stage
from mmft.errors import CheckpointError, ModelError
from mmft.modeling import attention
from mmft.modeling.llava import LlavaModel
from mmft.modeling.sequence import Stretch
from mmft.plugins import Plugins
from mmft.ranks import Ranks, all_raise
from mmft.train.builds import clear_abandoned_builds

ENGINE = "engine.json"  # in a checkpoint
OPTIMIZER = "optimizer"  # in a checkpoint of FSDP2: a folder of torch.distributed.checkpoint
ENTRIES = ("generate", "picture_features")  # what is called on a model from outside, beside its forward


class Engine:
    """One process, or DDP: every process holds everything."""

    name = "ddp"
    sharded = False  # whether a process holds only a part of the weights, so that all must run every part together
    saves_optimizer = False  # else transformers does

    def __init__(self, ranks: Ranks, *, sequence: int = 1) -> None:
        """Every `sequence` processes share their rows. Raises `ModelError` where that does not come out even."""
        self.ranks, self.sequence = ranks, sequence
        if ranks.size % sequence:
            error = ModelError(
                f"runtime.sequence_parallel: {sequence} must divide the number of processes ({ranks.size})"
            )
            all_raise(error)

    def share_rows(self, built: LlavaModel) -> None:
        """Let every `sequence` processes share their rows. Raises `ModelError` where that cannot be."""
        size = self.sequence
        if size == 1:
            return
        heads = [getattr(built.causal_lm.config, name) for name in HEADS]
        if any(number % size for number in heads):
            all_raise(ModelError(uneven_heads(size, heads)))
        if attention.VARLEN not in built.causal_lm.config._attn_implementation:
            told = "runtime.sequence_parallel: this model's attention cannot exchange heads; set it to 1"
            all_raise(ModelError(told))
        join_deepspeed(self.ranks)
        groups = [dist.new_group(range(first, first + size)) for first in range(0, self.ranks.size, size)]
        built.stretch = Stretch(self.ranks.rank % size, size, groups[self.ranks.rank // size])

    @property
    def counts_rows(self) -> bool:
        """Whether this process counts what it sees: of those who share a row only the first does."""
        return self.ranks.rank % self.sequence == 0

    def build_device(self, device: torch.device) -> torch.device:
        """Where the model is built: at once where it is trained."""
        return device

    def arguments(self, built: LlavaModel) -> dict[str, Any]:
        """Further arguments for transformers. DDP looks for unused parameters only where an encoder may have some."""
        return {"ddp_find_unused_parameters": built.vision_trains}

    def prepare(self, built: LlavaModel, device: torch.device) -> None:
        """Before the trainer gets the model."""

    def full(self, tensor: Tensor) -> Tensor:
        """A whole weight, on the CPU. Every process must ask for the same weights in the same order."""
        return tensor.detach().cpu()

    def save_optimizer(self, trainer: Any, folder: Path) -> None:
        """Write the optimizer's state."""

    def load_optimizer(self, trainer: Any, folder: Path) -> None:
        """Read what `save_optimizer` wrote."""

    def described(self) -> str:
        """For the report: empty for a single process."""
        return "" if self.ranks.size == 1 and type(self) is Engine else f", {self.ranks.size} x {self.name}"

    def describe(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        shared = f", each row shared by {self.sequence}" if self.sequence > 1 else ""
        return {"engine": self.name + shared, "processes": self.ranks.size}

    def write(self, folder: Path) -> None:
        """Note in a checkpoint who wrote it."""
        (folder / ENGINE).write_text(json.dumps(self.describe()), "utf-8")

    def refuse_other(self, checkpoint: Path) -> None:
        """Raise `CheckpointError` where a checkpoint's optimizer state and data order are not for this run."""
        path, own = checkpoint / ENGINE, self.describe()
        written = json.loads(path.read_text("utf-8")) if path.is_file() else own
        if written != own:
            raise CheckpointError(
                f"{checkpoint} was written by {written['processes']} process(es) under {written['engine']}, this run "
                f"has {own['processes']} under {own['engine']}: optimizer state and data order do not fit; go on as it "
                "was, or start a new run from its weights (model.llm.adapter, model.llm.path, vision.projector_weights)"
            )


class DeepSpeed(Engine):
    """ZeRO, through transformers' integration. From stage 3 on the weights are sharded too."""

    def __init__(self, ranks: Ranks, content: dict[str, Any], *, sequence: int = 1) -> None:
        super().__init__(ranks, sequence=sequence)
        self.content, self.stage = content, zero_stage(content)
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        self.sharded, self.saves_optimizer = self.stage == 3, True

    def arguments(self, built: LlavaModel) -> dict[str, Any]:
        """The JSON, with the sizes that DeepSpeed's users write as "auto" (transformers looks for them in vain)."""
        join_deepspeed(self.ranks)
        width = int(built.causal_lm.get_input_embeddings().weight.shape[1])
        sizes = {
            "reduce_bucket_size": max(width * width, 1 << 20),
            "stage3_prefetch_bucket_size": int(0.9 * width * width),
            "stage3_param_persistence_threshold": 10 * width,
        }
        content: dict[str, Any] = json.loads(json.dumps(self.content))
        section = content.get("zero_optimization", {})
        section |= {key: size for key, size in sizes.items() if section.get(key) == "auto"}
        if built.device.type == "cpu" and not torch.cuda.is_available():
            for key in ("offload_optimizer", "offload_param"):
                if key in section:
                    section[key] = {**section[key], "pin_memory": False}  # there is no GPU to copy to
        return {"deepspeed": content}

    def prepare(self, built: LlavaModel, device: torch.device) -> None:
        """Under ZeRO-3 every process must call every layer equally often, so none works through its loss in pieces."""
        if self.stage == 3:
            built.loss_piece = None

    def full(self, tensor: Tensor) -> Tensor:
        """A trained weight from its float32 master copy, whatever the precision; a frozen one as it is."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        parameter: Any = tensor
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            master: Tensor | None = safe_get_full_fp32_param(tensor)
            if master is not None:
                return master.detach().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape))
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                return tensor.detach().cpu().clone()
        return tensor.detach().cpu()

    def save_optimizer(self, trainer: Any, folder: Path) -> None:
        """Each process its shard; frozen weights are not copied (a 7B base would be 15 GB a checkpoint)."""
        trainer.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)

    def load_optimizer(self, trainer: Any, folder: Path) -> None:
        """The shard of this process, and the trained weights from their master copies."""
        loaded, _ = trainer.model_wrapped.load_checkpoint(
            str(folder), load_module_strict=False, load_optimizer_states=True, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise CheckpointError(f"{folder} has no DeepSpeed state; start anew from its weights")


class Fsdp(Engine):
    """torch's own FSDP2: `fully_shard` on every block and on the whole.

    accelerate's FSDP plugin silently becomes DDP on a CPU (accelerate 1.15, state.py). The model is therefore sharded
    here, before transformers sees it, the same way on CPUs and GPUs, and transformers is told that it is.
    """

    name = "FSDP2"
    sharded = saves_optimizer = True

    def build_device(self, device: torch.device) -> torch.device:
        """Block after block moves from the CPU to its place: no GPU ever holds all of them."""
        return torch.device("cpu")

    def arguments(self, built: LlavaModel) -> dict[str, Any]:
        """None: see `MMTrainer`."""
        return {}

    def prepare(self, built: LlavaModel, device: torch.device) -> None:
        """Shard in place: block by block, then what is left (embeddings, head, projector) with the root."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.ranks.size,))
        policy = MixedPrecisionPolicy()
        if built.dtype is not torch.float32:  # what autocast computes in is also what is sent
            policy = MixedPrecisionPolicy(built.dtype, torch.float32, cast_forward_inputs=False)
        for block in blocks(built):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(built, mesh=mesh, mp_policy=policy)
        for entry in ENTRIES:
            register_fsdp_forward_method(built, entry)

    def full(self, tensor: Tensor) -> Tensor:
        """All shards together."""
        from torch.distributed.tensor import DTensor

        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()

    def save_optimizer(self, trainer: Any, folder: Path) -> None:
        """Each process its shard."""
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self._state(trainer), checkpoint_id=folder / OPTIMIZER)

    def load_optimizer(self, trainer: Any, folder: Path) -> None:
        """The shard of this process."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        state = self._state(trainer)
        load(state, checkpoint_id=folder / OPTIMIZER)
        set_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, state)

    def _state(self, trainer: Any) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        state: dict[str, Any] = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer)
        return state


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers of language model and encoder: what stands in the outermost `ModuleList`s."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks(child)


def join_deepspeed(ranks: Ranks) -> None:
    """Let DeepSpeed use the process group there is. What it prints from every process is of its own kernels."""
    import deepspeed

    if ranks.local == 0:
        clear_abandoned_builds()
    ranks.wait()
    if not deepspeed.comm.is_initialized():
        with redirect_stdout(StringIO()):
            deepspeed.init_distributed()


def choose_engine(config: TrainConfig, plugins: Plugins, ranks: Ranks) -> Engine:
    """The engine a config asks for.

    Models are loaded whole and sharded afterwards, so transformers must forget an earlier run's ZeRO-3 before.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    runtime = config.runtime
    if runtime.deepspeed:
        content = read_deepspeed(runtime.deepspeed, plugins)
        return DeepSpeed(ranks, content, sequence=runtime.sequence_parallel)
    return (Fsdp if runtime.fsdp else Engine)(ranks, sequence=runtime.sequence_parallel)

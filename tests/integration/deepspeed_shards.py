"""Run by torchrun in test_convert_import_pth.py: checkpoints as DeepSpeed itself writes them, for each ZeRO stage.

`torchrun deepspeed_shards.py FOLDER` reads FOLDER/weights.pt, makes a module of parameters with those names, takes two
steps with it, and writes FOLDER/stage-N.pth as XTuner's strategy asks for it, and the weights as DeepSpeed puts them
together to FOLDER/stage-N.whole.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmft.train.builds import clear_abandoned_builds

FROZEN = "visual_encoder."


class Leaf(nn.Module):
    """The parameters of one layer. ZeRO-3 gathers them where the layer is called."""

    def forward(self) -> Tensor:
        """A number that every weight of the layer has a part in."""
        return sum((parameter.float() + 0.5).square().sum() for parameter in self.parameters())


class Named(nn.Module):
    """Parameters under dotted names. Calls all its layers."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for depth, part in enumerate(path):
                if part not in module._modules:
                    module.add_module(part, Leaf() if depth == len(path) - 1 else nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=not name.startswith(FROZEN)))

    def forward(self) -> Tensor:
        """The sum over all layers."""
        return sum(module() for module in self.modules() if isinstance(module, Leaf))


def write(folder: Path, stage: int) -> None:
    """Two steps, the checkpoint, and what it must hold."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = Named(torch.load(folder / "weights.pt", weights_only=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:3]}, {"params": trained[3:]}] if stage < 3 else [{"params": trained}]
    content = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=content)
    for _ in range(2):
        engine.backward(engine())
        engine.step()
    engine.save_checkpoint(
        str(folder), tag=f"stage-{stage}.pth", client_state={"meta": {"iter": 2}}, save_latest=False,
        exclude_frozen_parameters=True,
    )  # fmt: skip
    whole = {
        name: safe_get_full_fp32_param(parameter).clone().reshape(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    if dist.get_rank() == 0:
        torch.save(whole, folder / f"stage-{stage}.whole.pt")
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        clear_abandoned_builds()
    dist.barrier()
    for stage in (1, 2, 3):
        write(Path(sys.argv[1]), stage)
    dist.destroy_process_group()

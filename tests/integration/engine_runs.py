"""Run by torchrun in test_engines.py: several training runs in one process group, and what was seen of each.

Importing torch and transformers takes longer than all of these runs together, so each process is started once.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from mmft import hookimpl
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, override, use
from mmft.errors import TrainingError
from mmft.modeling import loss
from mmft.plugins import load_plugins

SEEN: dict[str, Any] = {}
STEPS = 4
GLOBAL_BATCH = 8


class Watch(TrainerCallback):
    """How the engine holds weights, and its optimizer's groups after the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        weight = next(iter(model.parameters()))
        if state.global_step == 1:
            SEEN["groups"] = [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        stretch = getattr(model, "stretch", None)
        SEEN["stretch"] = [stretch.rank, stretch.size] if stretch else None
        SEEN["optimizer"] = type(getattr(optimizer, "optimizer", optimizer)).__name__
        SEEN["weight"] = type(weight.data).__name__
        SEEN["held"] = int(weight.to_local().numel() if hasattr(weight, "to_local") else weight.numel())
        SEEN["whole"] = int(getattr(weight, "ds_numel", weight.numel()))


@hookimpl
def mmft_callbacks(config):
    return [Watch()]


def config_for(
    folder: Path, name: str, ranks: int, *, sees: bool, lora: bool, engine: dict[str, Any], packing: bool = False
) -> TrainConfig:
    """The same eight samples a step, whatever the number of ranks and of micro-batches."""
    micro, ranks = engine.get("micro", 2), ranks // engine.get("sequence_parallel", 1)
    engine = {key: value for key, value in engine.items() if key != "micro"}
    llm = LLM(path=str(folder / "llm"), trainable=not lora, lora=Lora(r=4, alpha=8, dropout=0.0) if lora else None)
    vision = Vision(
        encoder=use("clip", path=str(folder / "clip"), select_layer=-2),
        projector=use("mlp2x_gelu"),
        lora=Lora(r=2, alpha=4, dropout=0.0) if lora else None,
    )
    source = Dataset(source=use("json", path=str(folder / "llava.json")), data_map="llava", image_folder=folder)
    text = Dataset(source=use("json", path=str(folder / "text.json")), data_map="llava")
    return TrainConfig(
        model=Model(llm=llm, vision=vision if sees else None),
        data=Data(datasets=(source if sees else text,), max_length=256, chat_template="chatml", packing=packing),
        optim=Optim(
            lr=5e-3, projector_lr=1e-2 if sees else None, vision_lr=2e-3 if sees and lora else None,
            weight_decay=0.1, warmup_ratio=0.0, max_steps=STEPS,
            batch_size_per_device=micro, accumulate=GLOBAL_BATCH // (micro * ranks),
        ),
        runtime=Runtime(
            output_dir=folder / name, cache_dir=folder / f"cache-{ranks}", device="cpu", logging_steps=1, save_steps=2,
            **engine,
        ),
    )  # fmt: skip


def run(config: TrainConfig, *, resume: Path | None = None) -> dict[str, Any]:
    """Train, and tell losses, gradient norms, the engine's groups, and a digest of the weights in `final/`."""
    from mmft.train.run import train

    SEEN.clear()
    began = time.monotonic()
    code = train(config, load_plugins([sys.modules[__name__]]), resume=resume or False, overwrite=resume is None)
    folder = config.runtime.output_dir
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    weights = {
        str(path.relative_to(folder / "final")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "final").rglob("*.safetensors"))
    }
    return {
        "code": code,
        "loss": [line["loss"] for line in lines if "loss" in line],
        "norm": [line["grad_norm"] for line in lines if "loss" in line],
        "validation": [line["validation_loss"] for line in lines if "validation_loss" in line],
        "samples": [json.loads(path.read_text("utf-8")) for path in sorted((folder / "samples").glob("*.json"))],
        "events": len(list((folder / "tensorboard").glob("*"))),
        "weights": weights,
        "seconds": time.monotonic() - began,
        **SEEN,
    }


def main(folder: Path, plan: dict[str, dict[str, Any]]) -> None:
    """Everything in the plan, in one process group; the first rank writes what was seen."""
    dist.init_process_group("gloo")
    loss.tokens_at_once = lambda num_words: 3  # the runs in one process compute all logits of a batch at once
    ranks = dist.get_world_size()
    told = {}
    for name, wanted in plan.items():
        resume = wanted.pop("resume", None)
        changes = wanted.pop("set", {})
        config = config_for(folder, resume or name, ranks, **wanted)
        config = override(config, changes) if changes else config
        try:
            told[name] = run(config, resume=folder / resume / "checkpoint-2" if resume else None)
        except (TrainingError, SystemExit) as error:
            told[name] = {"ended": str(error)}
        if os.environ["RANK"] != "0":
            (folder / f"{name}-of-another.json").write_text(json.dumps(told[name].get("ended")), "utf-8")
        else:
            (folder / "told.json").write_text(json.dumps(told, indent=1), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""The demo's stage 2: QLoRA on the 4-bit SmolLM2-135M and the projector, on questions about pictures.

A conversation opens with a description of the picture and goes on with its questions. A yes/no question compares a word
with what the picture shows; a model of this size learns that from its own description, and did not without one in the
time there is (docs/benchmarks.md).
"""

from mmft.config import override
from mmft_configs.demo.llava_demo_pretrain import ROOT
from mmft_configs.demo.llava_demo_pretrain import config as base

config = override(
    base,
    {
        "model.llm.lora": {"r": 16, "alpha": 32, "dropout": 0.0},
        "model.vision.projector_weights": "work_dirs/llava_demo_pretrain/final",
        "data.datasets.0.source.path": ROOT / "data" / "finetune.json",
        "data.datasets.0.limit": 520,
        "optim.lr": 1e-3,
        "optim.projector_lr": 3e-4,
        "optim.batch_size_per_device": 4,
        "runtime.output_dir": "work_dirs/llava_demo_finetune",
        "runtime.sample_steps": 40,
    },
)

"""llava_finetune with the 13B Vicuna: a variant states only what differs."""

from mmft.config import override
from mmft_configs.llava.llava_finetune import config as base

config = override(
    base,
    {
        "model.llm.path": "lmsys/vicuna-13b-v1.5",
        "model.vision.projector_weights": "work_dirs/llava_13b_pretrain/final",
        "optim.batch_size_per_device": 2,
        "optim.accumulate": 64,
        "runtime.output_dir": "work_dirs/llava_13b_finetune",
    },
)

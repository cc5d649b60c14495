"""LLaVA stage 2 on InternLM2-Chat-1.8B: QLoRA, LoRA on CLIP too, as XTuner's recipe of this pair has it.

The counterpart of XTuner's llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune: LLM LoRA r=512
alpha=256, encoder LoRA r=64 alpha=16, 2e-4 for everything. Not yet run at full size.
"""

from mmft.config import override
from mmft_configs.llava.llava_finetune import config as base

config = override(
    base,
    {
        "model.llm.path": "internlm/internlm2-chat-1_8b",
        "model.llm.trust_remote_code": True,  # InternLM2's own modelling code; transformers has none
        "model.llm.lora": {"r": 512, "alpha": 256},
        "model.vision.lora": {"r": 64, "alpha": 16},
        "model.vision.projector_weights": "work_dirs/llava_internlm2_1_8b_pretrain/final",
        "data.chat_template": "internlm2_chat",
        "optim.projector_lr": None,
        "optim.batch_size_per_device": 8,
        "optim.accumulate": 16,
        "runtime.output_dir": "work_dirs/llava_internlm2_1_8b_finetune",
    },
)

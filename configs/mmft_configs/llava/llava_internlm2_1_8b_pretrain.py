"""LLaVA stage 1 on InternLM2-Chat-1.8B: the projector learns to speak to a small 4-bit Chinese-English model.

The counterpart of XTuner's llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain, with its chat template
kept (human prompt included). Not yet run at full size.
"""

from mmft.config import override
from mmft_configs.llava.llava_pretrain import config as base

config = override(
    base,
    {
        "model.llm.path": "internlm/internlm2-chat-1_8b",
        "model.llm.trust_remote_code": True,  # InternLM2's own modelling code; transformers has none
        "data.chat_template": "internlm2_chat",
        "optim.batch_size_per_device": 16,
        "optim.accumulate": 16,
        "runtime.output_dir": "work_dirs/llava_internlm2_1_8b_pretrain",
    },
)

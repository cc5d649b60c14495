"""Text SFT of every weight, for a small model on a larger card, in the model's own chat template.

Not yet run at full size.
"""

from mmft.config import override
from mmft_configs.text.llama3_8b_qlora_messages import config as base

config = override(
    base,
    {
        "model.llm": {"path": "Qwen/Qwen2.5-0.5B-Instruct", "trainable": True},
        "data.chat_template": "auto",
        "optim.lr": 2e-5,
        "runtime.output_dir": "work_dirs/custom_full_sft",
    },
)

"""Text SFT: QLoRA on InternLM2-Chat-1.8B with Alpaca data, packed; a first run for an 8 GB card.

XTuner's defaults: LoRA r=64 alpha=16 on all linear layers, lr 2e-4, 16 rows of 2048 a step. Not yet run at full size.
"""

from pathlib import Path

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Prompt, Runtime, TrainConfig, use

# -- 1. Settings: the few lines most people change ---------------------------------------------
LLM_PATH = "internlm/internlm2-chat-1_8b"
DATA = Path("data/alpaca_data.json")

config = TrainConfig(
    # -- 2. Model & tokenizer ------------------------------------------------------------------
    model=Model(
        # trust_remote_code: InternLM2's own modelling code; transformers has none
        llm=LLM(path=LLM_PATH, quantization="nf4", lora=Lora(r=64, alpha=16, dropout=0.1), trust_remote_code=True)
    ),
    # -- 3. Dataset & dataloader ---------------------------------------------------------------
    data=Data(
        datasets=(Dataset(source=use("json", path=DATA), data_map="alpaca"),),
        chat_template="internlm2_chat",
        max_length=2048,  # tokens
        packing=True,
    ),
    # -- 4. Scheduler & optimizer --------------------------------------------------------------
    optim=Optim(lr=2e-4, epochs=3, batch_size_per_device=1, accumulate=16),
    # -- 5. Runtime ----------------------------------------------------------------------------
    runtime=Runtime(
        output_dir=Path("work_dirs/internlm2_1_8b_qlora_alpaca"),
        gradient_checkpointing=True,
        sample_steps=500,
        samples=(Prompt(text="请给我介绍五个上海的景点"), Prompt(text="Please tell me five scenic spots in Shanghai")),
    ),
)

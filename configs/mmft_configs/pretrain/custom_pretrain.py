"""Incremental pretraining: teach a base model a field from plain text, every token a target, packed.

Records are {"text": "…"}, one a line. LoRA of a high rank on a 4-bit base; `--set model.llm.lora=none --set
model.llm.quantization=none --set model.llm.trainable=true` trains every weight. Not yet run at full size.
"""

from pathlib import Path

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Prompt, Runtime, TrainConfig, use

# -- 1. Settings: the few lines most people change ---------------------------------------------
LLM_PATH = "Qwen/Qwen2.5-1.5B"
DATA = Path("data/documents.jsonl")

config = TrainConfig(
    # -- 2. Model & tokenizer ------------------------------------------------------------------
    model=Model(llm=LLM(path=LLM_PATH, quantization="nf4", lora=Lora(r=128, alpha=128, dropout=0.0))),
    # -- 3. Dataset & dataloader ---------------------------------------------------------------
    data=Data(
        datasets=(Dataset(source=use("jsonl", path=DATA), data_map="pretrain"),),
        max_length=2048,  # tokens
        packing=True,
        too_long="truncate",
        max_bad_fraction=0.05,
    ),
    # -- 4. Scheduler & optimizer --------------------------------------------------------------
    optim=Optim(lr=1e-4, epochs=1, batch_size_per_device=1, accumulate=16),
    # -- 5. Runtime ----------------------------------------------------------------------------
    runtime=Runtime(
        output_dir=Path("work_dirs/custom_pretrain"),
        gradient_checkpointing=True,
        sample_steps=500,
        samples=(Prompt(text="上海的景点有"),),
    ),
)

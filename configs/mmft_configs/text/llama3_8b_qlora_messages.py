"""Text SFT: QLoRA on Llama-3-8B-Instruct with your own OpenAI-style messages (jsonl).

Not yet run at full size.
"""

from pathlib import Path

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use

# -- 1. Settings: the few lines most people change ---------------------------------------------
LLM_PATH = "meta-llama/Meta-Llama-3-8B-Instruct"
DATA = Path("data/messages.jsonl")  # {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}

config = TrainConfig(
    # -- 2. Model & tokenizer ------------------------------------------------------------------
    model=Model(llm=LLM(path=LLM_PATH, quantization="nf4", lora=Lora(r=64, alpha=16, dropout=0.1))),
    # -- 3. Dataset & dataloader ---------------------------------------------------------------
    data=Data(
        datasets=(Dataset(source=use("jsonl", path=DATA), data_map="messages"),),
        chat_template="llama3_chat",
        max_length=2048,  # tokens
        packing=True,
    ),
    # -- 4. Scheduler & optimizer --------------------------------------------------------------
    optim=Optim(lr=2e-4, epochs=3, batch_size_per_device=1, accumulate=16),
    # -- 5. Runtime ----------------------------------------------------------------------------
    runtime=Runtime(output_dir=Path("work_dirs/llama3_8b_qlora_messages"), gradient_checkpointing=True),
)

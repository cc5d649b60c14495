"""Agent SFT: teach a model to call tools from OpenAI messages with tools and tool_calls.

The model's own template writes the calls, so what is trained is what its server parses. Tool output is never a target.
Not yet run at full size.
"""

from pathlib import Path

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use

# -- 1. Settings: the few lines most people change ---------------------------------------------
LLM_PATH = "Qwen/Qwen2.5-7B-Instruct"
DATA = Path("data/agent.jsonl")

config = TrainConfig(
    # -- 2. Model & tokenizer ------------------------------------------------------------------
    model=Model(llm=LLM(path=LLM_PATH, quantization="nf4", lora=Lora(r=64, alpha=16))),
    # -- 3. Dataset & dataloader ---------------------------------------------------------------
    data=Data(
        datasets=(Dataset(source=use("jsonl", path=DATA), data_map="agent"),),
        chat_template="auto",
        max_length=4096,  # tokens
        packing=True,
    ),
    # -- 4. Scheduler & optimizer --------------------------------------------------------------
    optim=Optim(lr=1e-4, epochs=3, batch_size_per_device=1, accumulate=16),
    # -- 5. Runtime ----------------------------------------------------------------------------
    runtime=Runtime(output_dir=Path("work_dirs/agent_sft"), gradient_checkpointing=True),
)

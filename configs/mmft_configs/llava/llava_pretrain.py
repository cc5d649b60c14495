"""LLaVA-1.5 stage 1: train the projector between CLIP and a frozen 4-bit Vicuna-7B on captions.

After LLaVA-1.5 (https://arxiv.org/abs/2310.03744): lr 1e-3, batch 256, one epoch of blip_laion_cc_sbu_558k. On one card
the 256 are 8 x 32. The `plain` template drops the human prompt, as LLaVA's does. Not yet run at full size.
"""

from pathlib import Path

from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use

# -- 1. Settings: the few lines most people change ---------------------------------------------
LLM_PATH = "lmsys/vicuna-7b-v1.5"
CLIP_PATH = "openai/clip-vit-large-patch14-336"
DATA_ROOT = Path("data/llava/LLaVA-Pretrain")

config = TrainConfig(
    # -- 2. Model & tokenizer ------------------------------------------------------------------
    model=Model(
        llm=LLM(path=LLM_PATH, quantization="nf4"),
        vision=Vision(
            encoder=use("clip", path=CLIP_PATH, select_layer=-2, pad_to_square=False),
            projector=use("mlp2x_gelu"),
        ),
    ),
    # -- 3. Dataset & dataloader ---------------------------------------------------------------
    data=Data(
        datasets=(
            Dataset(
                source=use("json", path=DATA_ROOT / "blip_laion_cc_sbu_558k.json"),
                image_folder=DATA_ROOT / "images",
                data_map="llava",
            ),
        ),
        chat_template="plain",
        max_length=2048,  # tokens, image tokens included (CLIP-L/14@336 takes 576)
        num_workers=4,
    ),
    # -- 4. Scheduler & optimizer --------------------------------------------------------------
    optim=Optim(lr=1e-3, epochs=1, batch_size_per_device=8, accumulate=32),
    # -- 5. Runtime ----------------------------------------------------------------------------
    runtime=Runtime(output_dir=Path("work_dirs/llava_pretrain"), gradient_checkpointing=True),
)

"""LLaVA-1.5 stage 2: QLoRA on a 4-bit Vicuna-7B, CLIP frozen, projector trained on.

After LLaVA-1.5 (https://arxiv.org/abs/2310.03744): its LoRA recipe (r=128, alpha=256, lr 2e-4, projector 2e-5, batch
128) on a 4-bit base. XTuner's r=512 is one `--set model.llm.lora.r=512` away. Not yet run at full size.
"""

from pathlib import Path

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use

# -- 1. Settings: the few lines most people change ---------------------------------------------
LLM_PATH = "lmsys/vicuna-7b-v1.5"
CLIP_PATH = "openai/clip-vit-large-patch14-336"
STAGE1 = Path("work_dirs/llava_pretrain/final")
DATA_ROOT = Path("data/llava")

config = TrainConfig(
    # -- 2. Model & tokenizer ------------------------------------------------------------------
    model=Model(
        llm=LLM(path=LLM_PATH, quantization="nf4", lora=Lora(r=128, alpha=256)),
        vision=Vision(
            encoder=use("clip", path=CLIP_PATH, select_layer=-2, pad_to_square=True),
            projector=use("mlp2x_gelu"),
            projector_weights=STAGE1,
        ),
    ),
    # -- 3. Dataset & dataloader ---------------------------------------------------------------
    data=Data(
        datasets=(
            Dataset(
                source=use("json", path=DATA_ROOT / "llava_v1_5_mix665k.json"),
                image_folder=DATA_ROOT / "images",
                data_map="llava",
            ),
        ),
        chat_template="vicuna",
        max_length=2048,  # tokens, image tokens included (CLIP-L/14@336 takes 576)
        group_by_modality=True,
        num_workers=4,
    ),
    # -- 4. Scheduler & optimizer --------------------------------------------------------------
    optim=Optim(lr=2e-4, projector_lr=2e-5, epochs=1, batch_size_per_device=4, accumulate=32),
    # -- 5. Runtime ----------------------------------------------------------------------------
    runtime=Runtime(output_dir=Path("work_dirs/llava_finetune"), gradient_checkpointing=True),
)

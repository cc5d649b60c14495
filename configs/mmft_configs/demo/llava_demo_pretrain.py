"""The demo's stage 1: a frozen 4-bit SmolLM2-135M learns to name what DINOv2-small sees, through the projector alone.

`make demo` prepares the parts. DINOv2's 6th layer keeps colour and shape where its last one loses colour (linear probe:
.99 against .93), 112 px make 8 x 8 patches, and pixel_shuffle makes 16 tokens of them. One linear layer after a
LayerNorm learns the captions where an MLP does not in as many steps (docs/benchmarks.md).
"""

from pathlib import Path

from mmft.config import LLM, Data, Dataset, Model, Optim, Prompt, Runtime, TrainConfig, Vision, use

# -- 1. Settings: the few lines most people change ---------------------------------------------
ROOT = Path("work_dirs/demo")
ASKED = ("Describe the picture.", "what color is the shape?", "is there a red shape?")

config = TrainConfig(
    # -- 2. Model & tokenizer ------------------------------------------------------------------
    model=Model(
        llm=LLM(path=str(ROOT / "llm"), quantization="nf4"),
        vision=Vision(
            encoder=use("dinov2", path=str(ROOT / "dinov2"), select_layer=6, image_size=112, pad_to_square=True),
            # init_std: the output starts at the scale of the word embeddings, 0.136 = init_std * sqrt(4 * 384)
            projector=use("pixel_shuffle", scale=2, depth=1, norm=True, init_std=0.0035),
            feature_cache=ROOT / "features",
        ),
    ),
    # -- 3. Dataset & dataloader ---------------------------------------------------------------
    data=Data(
        datasets=(
            Dataset(
                source=use("json", path=ROOT / "data" / "pretrain.json"),
                image_folder=ROOT / "data" / "train",
                data_map="llava",
                limit=1280,
            ),
        ),
        chat_template="chatml",
        allow_template_difference=True,  # SmolLM2's own adds a system text of 30 tokens to every question
        max_length=512,  # tokens, image tokens included (16 a picture)
    ),
    # -- 4. Scheduler & optimizer --------------------------------------------------------------
    optim=Optim(lr=2e-3, betas=(0.9, 0.98), warmup_ratio=0.05, epochs=1, batch_size_per_device=16),
    # -- 5. Runtime ----------------------------------------------------------------------------
    runtime=Runtime(
        output_dir=Path("work_dirs/llava_demo_pretrain"),
        precision="bf16",
        logging_steps=5,
        sample_steps=30,
        samples=tuple(Prompt(text=text, images=(ROOT / "data" / "test" / "0.png",)) for text in ASKED),
    ),
)

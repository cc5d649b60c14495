"""The estimate of `mmft plan` against the measured peak: `python benchmarks/plan.py [--large] [FOLDER [SETTING ...]]`.

A random Llama, 512 wide, 4 layers, 8,000 tokens (`--large`: 1,024 wide, 8 layers, 32,000 tokens: peaks of 1 to 4 GiB),
on samples of 1,000 tokens, two in a batch (LLaVA: with pictures for a CLIP of 24 x 24 patches). Each setting is run in
a process of its own. On a CPU the measured peak is resident memory over what the process takes after its imports,
once as the probe does it, with glibc's malloc made to hand blocks back, and once with malloc left alone; on a GPU it is
`torch.cuda.max_memory_allocated`.
"""

import json
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.config.load import override
from mmft.plan.probe import probe
from mmft.plan.report import make_report
from mmft.plugins import load_plugins
from mmft.testing import tiny_tokenizer, tiny_vision

LORA = {"model.llm.trainable": False, "model.llm.lora": {"r": 16}}
SETTINGS: dict[str, dict[str, Any]] = {
    "full, fp32": {},
    "full, fp32, checkpointing": {"runtime.gradient_checkpointing": True},
    "full, bf16": {"runtime.precision": "bf16"},
    "full, fp32, accumulate 4": {"optim.accumulate": 4},
    "LoRA, fp32": LORA,
    "LoRA, bf16": {**LORA, "runtime.precision": "bf16"},
    "LoRA, bf16, checkpointing": {**LORA, "runtime.precision": "bf16", "runtime.gradient_checkpointing": True},
    "LoRA on nf4, bf16": {**LORA, "model.llm.quantization": "nf4", "runtime.precision": "bf16"},
    "full, 8-bit AdamW": {"optim.optimizer": "adamw_8bit"},
    "LLaVA, LoRA, bf16": {**LORA, "runtime.precision": "bf16", "model.vision": "yes"},
}


SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
LARGE = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16}


def build(folder: Path, *, large: bool = False) -> TrainConfig:
    """Write model, encoder and data, and return the first setting's config."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(folder / "llm")
    torch.manual_seed(0)
    sizes = {**(LARGE if large else SIZES), "vocab_size": 32000 if large else 8000}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, max_position_embeddings=4096)).save_pretrained(
        folder / "llm"
    )
    tiny_vision(folder / "clip", image_size=336, patch_size=14, width=256)
    Image.new("RGB", (336, 336), (200, 30, 30)).save(folder / "a.png")
    words = len(AutoTokenizer.from_pretrained(folder / "llm")("yes " * 100).input_ids) / 100
    for name, mark, length in (("text", "", 1000), ("seen", "<image>\n", 1000 - 576)):
        answer = "yes " * int(length / words)
        turns = [{"from": "human", "value": f"{mark}Count."}, {"from": "gpt", "value": answer}]
        record = {"conversations": turns, **({"image": "a.png"} if mark else {})}
        (folder / f"{name}.json").write_text(json.dumps([record] * 4))
    return TrainConfig(
        model=Model(llm=LLM(path=str(folder / "llm"), trainable=True)),
        data=Data(
            datasets=(Dataset(source=use("json", path=folder / "text.json"), data_map="llava", image_folder=folder),),
            chat_template="chatml",
            max_length=4096,
        ),
        optim=Optim(lr=1e-4, batch_size_per_device=2),
        runtime=Runtime(output_dir=folder / "run", precision="fp32"),
    )


def main() -> None:
    """Print a row for each setting."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--large"]
    folder = Path(arguments[0] if arguments else mkdtemp())
    config, plugins = build(folder, large="--large" in sys.argv), load_plugins()
    print(
        "| setting | estimated MiB | measured MiB | error | malloc left alone | s a step |\n|---|---|---|---|---|---|"
    )
    chosen = arguments[1:] or list(SETTINGS)
    for name in chosen:
        settings = SETTINGS[name]
        changes = dict(settings)
        changed = config
        if changes.pop("model.vision", None):
            seen = Vision(encoder=use("clip", path=str(folder / "clip")), projector=use("mlp2x_gelu"))
            dataset = config.data.datasets[0].model_copy(update={"source": use("json", path=folder / "seen.json")})
            data = config.data.model_copy(update={"datasets": (dataset,)})
            changed = config.model_copy(update={"model": Model(llm=config.model.llm, vision=seen), "data": data})
        changed = override(changed, changes)
        report = make_report(changed, plugins, with_probe=True, advise=False)
        assert report.measured and report.compared and report.error is not None
        estimate, peak = report.compared / 2**20, report.measured.peak / 2**20
        alone = probe(changed, hands_back=False).peak / 2**20
        print(
            f"| {name} | {estimate:,.0f} | {peak:,.0f} | {report.error:+.1%} | {alone:,.0f} "
            f"| {report.measured.seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

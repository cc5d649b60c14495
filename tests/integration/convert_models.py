"""Small trained models to convert: real parts of many families, their trained weights drawn at random."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.data.shape import describe_model
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import save_parts, write_manifest
from mmft.testing import tiny_tokenizer, tiny_vision

FAMILIES = {  # what differs from a Llama: model type, and options of its config
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "phi3": {"attention_dropout": 0.0, "original_max_position_embeddings": 2048},
    "gemma": {"tie_word_embeddings": True, "head_dim": 8},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 8, "final_logit_softcapping": 30.0},
}
LORA = Lora(r=4, alpha=16, dropout=0.0)
# float32 logits of a size of about 1 to 10; measured 2.4e-6 of their size over every model that the tests of `hf` make.
# A lost adapter, a wrong layer or a CLS token left in give 0.1 and more.
TOLERANCE = 2e-5


def family_llm(folder: Path, family: str, *, rows: int = 0, **tokenizer) -> Path:
    """A random causal LM of a family with a ChatML tokenizer; `rows` are rows beyond the vocabulary, as Qwen's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_tokenizer(folder, **tokenizer)
    hf = AutoTokenizer.from_pretrained(folder)
    options = {
        "vocab_size": len(hf) + rows, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2,
        "bos_token_id": hf.bos_token_id, "eos_token_id": hf.eos_token_id, "pad_token_id": hf.pad_token_id,
        "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(options | FAMILIES[family]))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trained(
    root: Path,
    plugins,
    *,
    family: str = "llama",
    encoder: str | None = "clip",
    projector: str | tuple[str, dict] = "mlp2x_gelu",
    template: str = "chatml",
    precision: str = "fp32",
    llm: dict | None = None,
    encoder_options: dict | None = None,
    vision: dict | None = None,
    rows: int = 0,
    **tokenizer,
) -> Path:
    """A model folder whose trained weights are random, far enough from where they started to be heard."""
    path = family_llm(root / "llm", family, rows=rows, **tokenizer)
    see = None
    if encoder:
        options = {"path": str(tiny_vision(root / "encoder", encoder)), "select_layer": -2, **(encoder_options or {})}
        kind, chosen = (projector, {}) if isinstance(projector, str) else projector
        see = Vision(encoder=use(encoder, **options), projector=use(kind, **chosen), **(vision or {}))
    model = Model(llm=LLM(path=str(path), **({"lora": LORA} if llm is None else llm)), vision=see)
    shape = describe_model(model, plugins)
    torch.manual_seed(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    built = build_model(
        model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=dtype, device=torch.device("cpu")
    )
    shake(built)
    source = Dataset(source=use("json", path="x.json"), data_map="llava")
    config = TrainConfig(
        model=model,
        data=Data(datasets=(source,), chat_template=template, max_length=64),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=root / "run"),
    )  # fmt: skip
    folder = root / "run" / "final"
    save_parts(folder, built, shape.tokenizer.hf)
    write_manifest(folder, config, plugins, precision)
    return folder


@torch.no_grad()
def shake(built) -> None:
    """Move every trained weight."""
    for parameter in built.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)

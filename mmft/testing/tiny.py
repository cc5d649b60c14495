"""Models small enough for a unit test: random, but real transformers models with fixed seeds.

They are written to a folder and loaded through the same code as a 7B.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant. USER: What is it? ASSISTANT: A cat.",
    "def add(a, b):\n    return a + b\n\nThe quick brown fox jumps over the lazy dog 0123456789.",
    '你好，世界。今天天气怎么样？ Ünïcödé ✓ — «quotes» {"name": "search", "arguments": {"q": "x"}}',
)


def tiny_tokenizer(
    folder: Path,
    *,
    chat_template: str = CHATML,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    bos: str | None = None,
    eos: str = "<|im_end|>",
    pad: str | None = None,
) -> Path:
    """Train a byte-level BPE tokenizer of about 400 tokens and save it with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=pad or special[0], **({"bos_token": bos} if bos else {})
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llm(folder: Path, *, layers: int = 2, width: int = 32, **tokenizer_options: Any) -> Path:
    """A random Llama of about 50,000 parameters with a tokenizer of its own."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(folder, **tokenizer_options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_vision(
    folder: Path, kind: str = "clip", *, image_size: int = 28, patch_size: int = 7, width: int = 32
) -> Path:
    """A random vision encoder of three blocks with its image processor; kind: clip, siglip, dinov2 or vit."""
    import torch
    from transformers import AutoConfig, AutoModel

    model_type, processor = {
        "clip": ("clip_vision_model", "CLIPImageProcessor"),
        "siglip": ("siglip_vision_model", "SiglipImageProcessor"),
        "dinov2": ("dinov2", "BitImageProcessor"),
        "vit": ("vit", "ViTImageProcessor"),
    }[kind]
    sizes = {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 2 * width}
    config = AutoConfig.for_model(model_type, image_size=image_size, patch_size=patch_size, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    square = {"height": image_size, "width": image_size}
    size = {"shortest_edge": image_size} if kind in ("clip", "dinov2") else square
    save_image_processor(folder, processor, size=size, crop_size=square)
    return folder


def save_image_processor(folder: Path, kind: str, *, size: Mapping[str, int], crop_size: Mapping[str, int]) -> None:
    """Write a `preprocessor_config.json` as the hub's vision models have one."""
    clip = kind in ("CLIPImageProcessor", "BitImageProcessor")
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": dict(size),
        "resample": 3 if clip else 2,
        "do_center_crop": clip,
        "crop_size": dict(crop_size),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if clip else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if clip else [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2))

"""The language model: loaded alone, so that quantisation touches nothing else."""

import sys
from pathlib import Path
from typing import Any

import torch

from mmft.config import LLM, Runtime
from mmft.errors import ModelError
from mmft.hub import HUGGINGFACE, failed, load_tokenizer, model_folder, new_token_ids


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights and matrix products. `auto`: bf16 on GPUs that have it, else fp16; fp32 on a CPU."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def choose_device(requested: str) -> torch.device:
    """The device of this process: its own CUDA device, MPS, or the CPU."""
    if requested == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_and_dtype(runtime: Runtime) -> tuple[torch.device, torch.dtype]:
    """Where a run computes, and in what."""
    device = choose_device(runtime.device)
    return device, compute_dtype(runtime.precision, device)


def load_llm(
    llm: LLM, *, dtype: torch.dtype, device: torch.device, path: str | Path | None = None, hub: str = HUGGINGFACE
) -> Any:
    """The causal language model, frozen, in `dtype` or quantised; `path` is a folder that training saved it in.

    A model that is trained whole is loaded in float32, so that small updates are not rounded away; autocast computes in
    `dtype`. Raises `ModelError` where the path is no model or does not load whole.
    """
    from transformers import AutoModelForCausalLM

    source = str(path) if path else model_folder("model.llm.path", llm.path, hub, llm.revision)
    options: dict[str, Any] = {"dtype": torch.float32 if llm.trainable else dtype}
    if llm.quantization != "none":
        options |= {"quantization_config": _quantization(llm.quantization, dtype), "device_map": {"": device}}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=llm.revision,
            trust_remote_code=llm.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(failed("model.llm.path", source, hub, error)) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{path or llm.path}: {len(missing)} weights are missing, the first is {missing[0]}")
    if llm.quantization == "none":
        model.to(device)
    keep_gradients_after_evaluation(model)
    if llm.new_tokens and not path:
        make_room(model, base_token_ids(llm, hub))
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    """bitsandbytes settings of QLoRA (https://arxiv.org/abs/2305.14314): 4-bit with double quantisation, or int8."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def base_token_ids(llm: LLM, hub: str) -> list[int]:
    """The ids of `llm.new_tokens`: as when the tokenizer of a run is made, from that of the base model."""
    if not llm.new_tokens:
        return []
    return new_token_ids(load_tokenizer(llm.model_copy(update={"new_tokens": ()}), hub), llm.new_tokens, llm.path)


@torch.no_grad()
def make_room(model: Any, ids: list[int]) -> None:
    """Rows for new tokens in the embedding and the head, each the mean of the rows before them.

    The mean itself, not a draw around it as transformers' `mean_resizing`: a base model that is loaded again must be
    the same one. A model whose matrix is larger than its vocabulary (Qwen's are) is not resized.
    """
    if model.get_input_embeddings().num_embeddings <= max(ids):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            weight = layer.weight
            weight[ids] = weight[: min(ids)].mean(0, dtype=torch.float32).to(weight.dtype)


def keep_gradients_after_evaluation(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU kernel without autograd.

    bitsandbytes 0.50.2 on CPUs with AVX512-BF16 does that at the first forward in eval mode without gradients; training
    that follows has gradients of exactly 0 in every layer below, silently. The flag is the layer's own. Can go when
    `tests/integration/test_loss_and_gradients.py` (training after an evaluation) passes without it.
    """
    for layer in quantized_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def quantized_layers(module: torch.nn.Module) -> list[Any]:
    """The bitsandbytes layers inside a module; none where bitsandbytes was never imported (that takes seconds)."""
    if "bitsandbytes" not in sys.modules:
        return []
    import bitsandbytes as bnb

    return [layer for layer in module.modules() if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]

"""Our `Lora` to peft, part by part: an adapter never reaches a module it was not given."""

from pathlib import Path
from typing import Any

from torch import nn

from mmft.config import Lora
from mmft.errors import CheckpointError, ModelError


def add_lora(part: nn.Module, lora: Lora, *, weights: Path | None = None, causal_lm: bool = False) -> Any:
    """Wrap a part in a peft adapter, new or read from `weights` (a PEFT folder), ready to train.

    Adapter weights are float32 whatever the base is in. Raises `ModelError` where the targets match nothing.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if weights is not None:
        try:
            return PeftModel.from_pretrained(part, weights, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{weights}: the adapter does not fit: {str(error).splitlines()[0]}") from error
    targets = sorted(linear_names(part)) if lora.targets == "all-linear" else list(lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM" if causal_lm else None,
    )
    try:
        return get_peft_model(part, config)
    except ValueError as error:
        raise ModelError(f"lora.targets {lora.targets}: {error}; linear layers: {sorted(linear_names(part))}") from None


def linear_names(part: nn.Module) -> set[str]:
    """The last names of all linear layers of a part, quantised ones included, without its output head."""
    get_head: Any = getattr(part, "get_output_embeddings", lambda: None)
    head = get_head()
    return {
        name.rpartition(".")[2]
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def base_of(part: Any) -> Any:
    """The model inside a peft wrapper, or the part itself."""
    return part.get_base_model() if hasattr(part, "get_base_model") else part


def is_adapted(part: Any) -> bool:
    """Whether a part carries a peft adapter."""
    return hasattr(part, "peft_config")

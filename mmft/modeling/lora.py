"""Our `Lora` to peft, part by part: an adapter never reaches a module it was not given.

PiSSA and OLoRA begin by taking the adapter's start out of the base weights. They are nevertheless saved as a plain
adapter of twice the rank, which any program can put on the untouched base, and from which training goes on exactly.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmft.config import Lora
from mmft.errors import CheckpointError, ModelError
from mmft.modeling.tensors import misfits, refuse_misfits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Adapter(PeftModel):  # type: ignore[misc]
    """A part with its adapter. `start` holds what the adapter took out of the base weights, where it did."""

    start: dict[str, Tensor]

    def __init__(self, part: nn.Module, config: Any) -> None:
        super().__init__(part, config)
        self.start = {}

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As peft's: never with whole embeddings, and as a plain adapter whatever it started from."""
        super().save_pretrained(str(save_directory), **{"save_embedding_layers": False, **options})
        if self.start and options.get("is_main_process", True):
            _add_start(Path(save_directory), self.start)


def add_lora(
    part: nn.Module,
    lora: Lora,
    *,
    weights: Path | None = None,
    causal_lm: bool = False,
    new_tokens: Sequence[int] = (),
    left_out: Sequence[str] = (),
    base: str | None = None,
) -> Adapter:
    """Wrap a part in a peft adapter, new or read from `weights` (a PEFT folder), ready to train.

    Adapter weights are float32 whatever the base is in. `new_tokens` are ids whose rows of the embedding and the head
    train with it; `left_out` are modules, by their whole names, that get no adapter; `base` is the model's name for the
    adapter's own config. Raises `ModelError` where the targets match nothing, `CheckpointError` where `weights` do not
    fit.
    """
    takes_from_base = lora.init.startswith(("pissa", "olora"))
    if weights is not None and not takes_from_base:
        return _read(part, weights, _token_rows(part, new_tokens))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(part, lora),
        exclude_modules=list(left_out) or None,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "default" or weights is not None else lora.init,
        trainable_token_indices=_token_rows(part, new_tokens),
        bias="none",
        task_type="CAUSAL_LM" if causal_lm else None,
        base_model_name_or_path=base,
    )
    try:
        adapted = Adapter(part, config)
    except ValueError as error:
        raise ModelError(f"lora.targets {lora.targets}: {error}; linear layers: {sorted(linear_names(part))}") from None
    if takes_from_base and weights is not None:
        _go_on(adapted, weights)
    elif takes_from_base:
        adapted.start = {name: tensor.cpu().clone() for name, tensor in _state(adapted).items() if ".lora_" in name}
    _train_in_float32(adapted)
    return adapted


def _targets(part: nn.Module, lora: Lora) -> list[str] | str:
    if lora.targets == "all-linear":
        return sorted(linear_names(part))
    return lora.targets if isinstance(lora.targets, str) else list(lora.targets)


def _token_rows(part: Any, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """peft's `trainable_token_indices`: the embedding, and the head where it has weights of its own."""
    if not ids:
        return None
    layers = [part.get_input_embeddings(), part.get_output_embeddings()]
    if layers[1] is None or layers[1].weight is layers[0].weight:  # peft ties the rows as the layers are
        layers.pop()
    return {name: list(ids) for name, module in part.named_modules() if any(module is layer for layer in layers)}


def _train_in_float32(adapted: Adapter) -> None:
    """peft does so with its matrices; the rows of new tokens come in the base's dtype."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _state(adapted: Adapter) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return state


def _read(part: nn.Module, weights: Path, token_rows: dict[str, list[int]] | None) -> Adapter:
    """An adapter as its folder has it, its rank and its other settings included."""
    try:
        config = PeftConfig.from_pretrained(str(weights))
        config.inference_mode = False
        if config.trainable_token_indices != token_rows:
            raise ValueError("it has the rows of other new tokens than model.llm.new_tokens; give those of its own run")
        adapted = Adapter(part, config)
        state = load_file(weights / WEIGHTS)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: the adapter does not fit: {str(error).splitlines()[0]}") from error
    _train_in_float32(adapted)
    _load(adapted, state, weights)
    return adapted


def _load(adapted: Adapter, state: dict[str, Tensor], weights: Path) -> None:
    """Every tensor in its place: a missing, unexpected or misshapen one is an error that names it."""
    refuse_misfits(misfits(_state(adapted), state), f"{weights}: the adapter does not fit")
    set_peft_model_state_dict(adapted, state)


def _add_start(folder: Path, start: dict[str, Tensor]) -> None:
    """Make a saved adapter a plain one of twice the rank: B A - B0 A0 = [B | -B0] [A ; A0].

    As peft's `subtract_mutated_init` does (huggingface/peft v0.21.2, tuners/lora/model.py), on the files: peft loads
    the start as a second adapter into the model for it, which a model in the hands of DDP, FSDP or DeepSpeed forbids.
    """
    state = load_file(folder / WEIGHTS)
    for name, before in start.items():
        is_a = ".lora_A." in name
        state[name] = torch.cat([state[name], before if is_a else -before.to(state[name].dtype)], 0 if is_a else 1)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2  # so that the scale stays
    config["init_lora_weights"] = True
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def _go_on(adapted: Adapter, weights: Path) -> None:
    """Take a saved start out of the base weights, with the very expression peft used, and go on from there."""
    try:
        state = load_file(weights / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: the adapter cannot be read: {str(error).splitlines()[0]}") from error
    for name in [name for name in state if ".lora_" in name]:
        is_a = ".lora_A." in name
        now, before = (half.contiguous() for half in state[name].chunk(2, 0 if is_a else 1))
        state[name], adapted.start[name] = now, before if is_a else -before
    _load(adapted, state, weights)
    for name, layer in adapted.named_modules():
        if f"{name}.lora_A.weight" not in adapted.start:
            continue
        a, b = (adapted.start[f"{name}.lora_{which}.weight"] for which in "AB")
        weight = layer.get_base_layer().weight
        taken = layer.scaling["default"] * b.to(weight.device) @ a.to(weight.device)
        weight.data = (weight.data.float() - taken).to(weight.dtype)


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

"""Weights that others trained, held against the models they belong to and given the names they have there."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmft.config import Lora, Model, Vision
from mmft.convert.hf.llava import write_shards
from mmft.convert.importing.files import State
from mmft.convert.importing.read import Adapter
from mmft.errors import CheckpointError, ModelError
from mmft.hub import encoder_options, failed, load_tokenizer, model_folder
from mmft.modeling.tensors import misfits, refuse_misfits
from mmft.plugins import Plugins

MAX_SHARD_SIZE = "2GB"
NO_WEIGHT = "rotary_emb.inv_freq"  # a table that transformers 4.30 and before saved with the weights


def outline_of(model: Model) -> Any:
    """The language model without weights."""
    from transformers import AutoConfig

    remote = model.llm.trust_remote_code
    path = model_folder("model.llm.path", model.llm.path, model.hub, model.llm.revision)
    try:
        config = AutoConfig.from_pretrained(path, revision=model.llm.revision, trust_remote_code=remote)
        return outline(config, trust_remote_code=remote)
    except (OSError, ValueError) as error:
        raise ModelError(failed("model.llm.path", path, model.hub, error)) from error


def outline(config: Any, *, trust_remote_code: bool = False) -> Any:
    """A language model of a config, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def settings_of(adapter: Adapter, lora: Lora | None, where: str, source: Path) -> dict[str, Any]:
    """A .pth does not say by what its LoRA is scaled: the config does."""
    if lora is None:
        raise CheckpointError(f"{source} holds a LoRA without its settings; give its r and alpha in {where}")
    rank = next(tensor.shape[0] for (_, half), tensor in adapter.weights.items() if half == "lora_A")
    if rank != lora.r:
        raise CheckpointError(f"{source}: its LoRA is of rank {rank}, {where}.r is {lora.r}")
    targets = sorted({name.rpartition(".")[2] for name, _ in adapter.weights})
    return {
        "r": rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora,
        "target_modules": targets,
    }  # fmt: skip


def fit(adapter: Adapter, modules: dict[str, nn.Module], source: Path) -> None:
    """Every weight has its layer, of its size."""
    for (name, half), tensor in adapter.weights.items():
        layer: Any = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"{source}: its adapter has {name}, which is no linear layer of the config's model")
        ours = layer.in_features if half == "lora_A" else layer.out_features
        theirs = tensor.shape[1 if half == "lora_A" else 0]
        if theirs != ours:
            raise CheckpointError(f"{source}: its adapter of {name} is for {theirs} values, the model here has {ours}")


def llm_state(state: State, outlined: Any, source: Path) -> State:
    """All weights of a language model, less what it ties to another. Raises `CheckpointError` for one that misfits."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(NO_WEIGHT)}
    own: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in outlined.state_dict(keep_vars=True).items():
        first, _ = own.setdefault(id(tensor), (name, tensor))  # the embedding stands before a head tied to it
        if first != name and name in state:
            state.setdefault(first, state[name])
            del state[name]
    refuse_misfits(misfits(dict(own.values()), state), f"{source}: its language model is not the config's")
    return state


def save_llm(folder: Path, state: State, outlined: Any, model: Model) -> None:
    """A plain folder of transformers, from which training can go on."""
    from transformers import GenerationConfig

    config = outlined.config
    config.dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    config.save_pretrained(folder)
    path = model_folder("model.llm.path", model.llm.path, model.hub, model.llm.revision)
    with suppress(OSError):  # a base model may have none
        GenerationConfig.from_pretrained(path, revision=model.llm.revision).save_pretrained(folder)
    load_tokenizer(model.llm, model.hub).save_pretrained(folder)
    write_shards(state, folder, MAX_SHARD_SIZE)


def build_encoder(vision: Vision, hub: str, plugins: Plugins) -> Any:
    """The encoder of a config, with its weights."""
    return plugins.vision_encoders.get(vision.encoder.name).build(**encoder_options(vision.encoder, plugins, hub))


def vision_state(state: State, encoder: nn.Module, source: Path) -> State:
    """All weights of an encoder by the names they have in ours, which is built as far as its features need it.

    Blocks behind the selected layer, the last norm and the pooling head are left out: no feature depends on them.
    """
    own = encoder.state_dict()
    found = {name: state[theirs] for name in own if (theirs := _longest_match(name, list(state))) is not None}
    refuse_misfits(misfits(own, found), f"{source}: its vision encoder is not the config's")
    return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}


def vision_adapter(adapter: Adapter, encoder: nn.Module, source: Path) -> Adapter:
    """The adapter by the names its layers have in our encoder, which differ by what stands before the blocks.

    A block behind the selected layer is not built here; XTuner gives it an adapter that never gets a gradient. One that
    was trained all the same is an error.
    """
    modules = dict(encoder.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    renamed, left_out = {}, []
    for (name, half), tensor in adapter.weights.items():
        own = _longest_match(name, layers)
        if own is None:
            left_out += [name] if half == "lora_B" and bool(tensor.any()) else []
        else:
            renamed[own, half] = tensor
    if left_out or not renamed:
        lost = left_out[0] if left_out else next(iter(adapter.weights))[0]
        raise CheckpointError(f"{source}: its adapter has {lost}, which the encoder of the config has not")
    found = Adapter(adapter.settings | {"target_modules": _targets({name for name, _ in renamed}, layers)}, renamed)
    fit(found, modules, source)
    return found


def _targets(adapted: set[str], layers: list[str]) -> list[str]:
    """The last names of the adapted layers, or the whole ones where others are called so too, as in a pooling head."""
    last = {name.rpartition(".")[2] for name in adapted}
    same = {layer for layer in layers if layer.rpartition(".")[2] in last}
    return sorted(last if same == adapted else adapted)


def _longest_match(name: str, others: list[str]) -> str | None:
    """The one of `others` that ends as this name does, its block's number included."""
    parts = name.split(".")
    for start in range(len(parts) - 1):
        tail = ".".join(parts[start:])
        if not any(part.isdigit() for part in parts[start:]) and any(part.isdigit() for part in parts):
            return None
        matches = [other for other in others if other == tail or other.endswith(f".{tail}")]
        if len(matches) == 1:
            return matches[0]
    return None

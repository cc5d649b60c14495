"""Bring what others trained: projectors and LoRA adapters of LLaVA, XTuner and TinyLLaVA.

The result is a folder a config starts from (`projector_weights`, `llm.adapter`), and with a config to hold it against a
whole model folder, which `mmft chat` opens.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmft.config import Lora, Model, TrainConfig, Use
from mmft.convert.importers_read import Adapter, Found, read_foreign
from mmft.errors import CheckpointError, ModelError
from mmft.hub import encoder_options, failed, load_tokenizer, model_folder
from mmft.modeling.build import ADAPTER, PROJECTOR, VISION_ADAPTER
from mmft.modeling.checkpoint import write_manifest, written_whole
from mmft.plugins import Plugins

KEPT = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def bring(
    source: Path,
    out: Path,
    *,
    config: TrainConfig | None,
    plugins: Plugins,
    ignore_names: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write what `source` holds to the folder `out`; returns a line for each thing, with how a config uses it.

    With `config` everything is held against its models and `out` is a model folder. Raises `CheckpointError` for a
    source that is none, holds what has no place here, or does not fit: by shape, or by the models it names.
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another place, or give --overwrite")
    found = read_foreign(source)
    if found.vision and config is None:
        raise CheckpointError(f"{source} has an adapter of the vision encoder; give --for CONFIG with its encoder")
    model = config.model if config else None
    if model is not None:
        if not ignore_names:
            _check_names(found, model, source)
        outline = _outline(model)
        _check_projector(found, model, plugins, outline, source)
        _check_llm(found, model, outline, source)
    with written_whole(out) as folder:
        _write(folder, found, model, plugins, source)
        if config is not None:
            _complete(folder, found, config, plugins)
    return _lines(found, out, config)


def _check_names(found: Found, model: Model, source: Path) -> None:
    """A projector fits only the very models it was trained between, whatever its shape."""
    ours = {"llm": model.llm.path, "encoder": str(model.vision.encoder.options.get("path", "")) if model.vision else ""}
    for part, theirs in found.names.items():
        if ours[part] and Path(theirs).name.lower() != Path(ours[part]).name.lower():
            raise CheckpointError(
                f"{source} was trained with the {part} {theirs}, the config has {ours[part]}; give that one, or "
                "--ignore-names where it is the same under another name"
            )


def _check_projector(found: Found, model: Model, plugins: Plugins, outline: Any, source: Path) -> None:
    if model.vision is None:
        raise CheckpointError(f"{source} has a projector, the config no model.vision")
    info = plugins.vision_encoders.get(model.vision.encoder.name).describe(
        **encoder_options(model.vision.encoder, model.hub)
    )
    weights = [tensor for key, tensor in sorted(found.projector.items()) if key.endswith("weight")]
    width = outline.get_input_embeddings().weight.shape[1]
    if weights[0].shape[1] != info.hidden_size or weights[-1].shape[0] != width:
        raise CheckpointError(
            f"{source}: its projector maps {weights[0].shape[1]} to {weights[-1].shape[0]} values; the encoder of the "
            f"config gives {info.hidden_size} and its language model takes {width}; give the models it was trained with"
        )


def _outline(model: Model) -> Any:
    """The language model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    remote = model.llm.trust_remote_code
    path = model_folder("model.llm.path", model.llm.path, model.hub, model.llm.revision)
    try:
        config = AutoConfig.from_pretrained(path, revision=model.llm.revision, trust_remote_code=remote)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    except (OSError, ValueError) as error:
        raise ModelError(failed("model.llm.path", path, model.hub, error)) from error


def _check_llm(found: Found, model: Model, outline: Any, source: Path) -> None:
    if found.llm is not None:
        if not found.llm.settings:
            found.llm.settings = _settings_of(found.llm, model.llm.lora, "model.llm.lora", source)
        _fit(found.llm, dict(outline.named_modules()), source)


def _settings_of(adapter: Adapter, lora: Lora | None, where: str, source: Path) -> dict[str, Any]:
    """A .pth does not say by what its LoRA is scaled: the config does."""
    if lora is None:
        raise CheckpointError(f"{source} holds a LoRA without its settings; give its r and alpha in {where}")
    rank = next(tensor.shape[0] for (_, half), tensor in adapter.weights.items() if half == "lora_A")
    if rank != lora.r:
        raise CheckpointError(f"{source}: its LoRA is of rank {rank}, {where}.r is {lora.r}")
    targets = sorted({name.rpartition(".")[2] for name, _ in adapter.weights})
    return {"r": rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": targets}


def _fit(adapter: Adapter, modules: dict[str, nn.Module], source: Path) -> None:
    """Every weight has its layer, of its size."""
    for (name, half), tensor in adapter.weights.items():
        layer: Any = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"{source}: its adapter has {name}, which is no linear layer of the config's model")
        ours = layer.in_features if half == "lora_A" else layer.out_features
        theirs = tensor.shape[1 if half == "lora_A" else 0]
        if theirs != ours:
            raise CheckpointError(f"{source}: its adapter of {name} is for {theirs} values, the model here has {ours}")


def _write(folder: Path, found: Found, model: Model | None, plugins: Plugins, source: Path) -> None:
    """Projector and adapters under the names of a model folder."""
    from safetensors.torch import save_file

    save_file(found.projector, folder / PROJECTOR)
    if found.llm is not None:
        base = model.llm.path if model else found.llm.settings.get("base_model_name_or_path")
        _save_adapter(found.llm, folder / ADAPTER, base=base, causal_lm=True)
    if found.vision is not None:
        assert model is not None
        assert model.vision is not None
        if not found.vision.settings:
            found.vision.settings = _settings_of(found.vision, model.vision.lora, "model.vision.lora", source)
        found.vision.weights = _vision_weights(found.vision, model, plugins, source)
        path = str(model.vision.encoder.options.get("path", ""))
        _save_adapter(found.vision, folder / VISION_ADAPTER, base=path, causal_lm=False)


def _save_adapter(adapter: Adapter, folder: Path, *, base: str | None, causal_lm: bool) -> None:
    """As peft does, and of the settings only those that say what the weights are."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    settings = {key: adapter.settings[key] for key in KEPT if adapter.settings.get(key) not in (None, {}, [])}
    config = LoraConfig(
        **settings, task_type="CAUSAL_LM" if causal_lm else None, base_model_name_or_path=base, inference_mode=True
    )
    config.save_pretrained(str(folder))
    state = {
        f"base_model.model.{name}.{half}.weight": tensor.contiguous().clone()
        for (name, half), tensor in adapter.weights.items()
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _vision_weights(
    adapter: Adapter, model: Model, plugins: Plugins, source: Path
) -> dict[tuple[str, str], torch.Tensor]:
    """The adapter by the names its layers have in our encoder, which differ by what stands before the blocks.

    A block behind the selected layer is not built here; XTuner gives it an adapter that never gets a gradient. One that
    was trained all the same is an error.
    """
    assert model.vision is not None
    encoder: Any = plugins.vision_encoders.get(model.vision.encoder.name).build(
        **encoder_options(model.vision.encoder, model.hub)
    )
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
    _fit(Adapter({}, renamed), modules, source)
    return renamed


def _longest_match(name: str, layers: list[str]) -> str | None:
    """The one layer whose name ends as this one does, its block's number included."""
    parts = name.split(".")
    for start in range(len(parts) - 1):
        tail = ".".join(parts[start:])
        if not any(part.isdigit() for part in parts[start:]) and any(part.isdigit() for part in parts):
            return None
        matches = [layer for layer in layers if layer == tail or layer.endswith(f".{tail}")]
        if len(matches) == 1:
            return matches[0]
    return None


def _complete(folder: Path, found: Found, config: TrainConfig, plugins: Plugins) -> None:
    """What makes it a model folder: the tokenizer, and a manifest with the parts as they are."""
    vision = config.model.vision
    assert vision is not None
    changes = {
        "projector": Use(name=found.projector_name),
        "projector_weights": None,
        "trainable": False,
        "lora": _lora(found.vision),
    }
    llm = config.model.llm.model_copy(update={"lora": _lora(found.llm), "adapter": None, "trainable": False})
    model = config.model.model_copy(update={"llm": llm, "vision": vision.model_copy(update=changes)})
    load_tokenizer(model.llm, model.hub).save_pretrained(folder / "tokenizer")
    precision = "bf16" if config.runtime.precision == "auto" else config.runtime.precision
    write_manifest(folder, config.model_copy(update={"model": model}), plugins, precision)


def _lora(adapter: Adapter | None) -> Lora | None:
    if adapter is None:
        return None
    settings = adapter.settings
    targets = settings.get("target_modules") or "all-linear"
    return Lora(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout", 0.0),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        dora=bool(settings.get("use_dora")),
        rslora=bool(settings.get("use_rslora")),
    )


def _lines(found: Found, out: Path, config: TrainConfig | None) -> list[str]:
    """What was brought, and how a config uses it."""
    lines = [f'{out / PROJECTOR}: {found.projector_name}; use it with projector_weights=Path("{out}")']
    if found.llm is not None:
        rank = found.llm.settings["r"]
        lines.append(f'{out / ADAPTER}: LoRA of rank {rank}; go on from it with adapter=Path("{out / ADAPTER}")')
    if found.vision is not None:
        lines.append(f"{out / VISION_ADAPTER}: LoRA of the vision encoder, of rank {found.vision.settings['r']}")
    lines += [f"{part}/ holds a whole model: name it in the config instead of the base model" for part in found.whole]
    if config is not None:
        lines.append(f"{out} is a model folder: mmft chat {out}")
    else:
        lines.append("not held against a model: --for CONFIG compares the shapes and makes a model folder")
    return lines

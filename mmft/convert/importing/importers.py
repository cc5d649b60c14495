"""Bring what others trained: projectors, adapters and whole parts of LLaVA, XTuner and TinyLLaVA.

The result is a folder a config starts from (`projector_weights`, `llm.adapter`, `vision.adapter`, `llm.path`), and with
a config to hold it against a whole model folder, which `mmft chat` opens. A source that is a whole model needs no
config: `whole`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmft import __version__
from mmft.config import Lora, Model, Use
from mmft.convert.importing.config import Target
from mmft.convert.importing.files import State, is_deepspeed
from mmft.convert.importing.read import Adapter, Found, read_foreign
from mmft.convert.importing.weights import (
    build_encoder,
    fit,
    llm_state,
    outline_of,
    save_llm,
    settings_of,
    vision_adapter,
    vision_state,
)
from mmft.convert.parity import proved
from mmft.convert.place import refuse_out
from mmft.errors import CheckpointError
from mmft.hub import encoder_options, encoder_path, load_tokenizer, named_from
from mmft.modeling.build import ADAPTER, LLM_FOLDER, PROJECTOR, VISION_ADAPTER, VISION_WEIGHTS
from mmft.modeling.checkpoint import (
    FORMAT,
    MANIFEST,
    checkpoints,
    differences,
    file_hashes,
    read_manifest,
    write_manifest,
)
from mmft.modeling.tensors import misfits, refuse_misfits
from mmft.plugins import Plugins

KEPT = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
TOKENIZER = "tokenizer"
OWN_PARTS = (
    ADAPTER,
    LLM_FOLDER,
    PROJECTOR,
    VISION_ADAPTER,
    "vision",
    TOKENIZER,
)  # of a model folder; not the optimizer


def bring(
    source: Path,
    out: Path,
    *,
    target: Target | None,
    plugins: Plugins,
    ignore_names: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write what `source` holds to the folder `out`; returns a line for each thing, with how a config uses it.

    With `target` everything is held against its models and `out` is a model folder. Raises `CheckpointError` for a
    source that is none, holds what has no place here, or does not fit: by shape, or by the models it names.
    """
    refuse_out(out, (source, *named_by(target)), overwrite=overwrite)
    found = read_foreign(source)
    if target is None and (found.vision or found.llm_weights or found.vision_weights or not found.projector):
        what = "an adapter of the vision encoder" if found.vision else "weights of the models themselves"
        raise CheckpointError(f"{source} has {what}; give --for CONFIG with its language model and encoder")
    model, outline = None, None
    if target is not None:
        model = target.model
        if not ignore_names:
            _check_names(found, model, source)
        _check_whole_folders(found, model, source)
        outline = _check(found, model, plugins, source)
    with proved(out, overwrite=overwrite, sources=(source, *named_by(target))) as folder:
        _write(folder, found, model, outline)
        if target is not None:
            _complete(folder, found, target, plugins)
    return _lines(found, out, target)


def named_by(target: Target | None) -> list[str]:
    """The paths of the models that a target names."""
    if target is None:
        return []
    return [name for name in (target.model.llm.path, encoder_path(target.model)) if name]


def pth_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    target: Target,
    plugins: Plugins,
    ignore_names: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """A training checkpoint of mmft or XTuner, of one process or many, as a model folder without training state."""
    above = (checkpoint.parent,) if is_deepspeed(checkpoint) else ()  # a run's checkpoint-4/global_step4
    places = (checkpoint, *above, checkpoint / "final", *checkpoints(checkpoint))
    own = next((place for place in places if (place / MANIFEST).is_file()), None)
    if own is None:
        return bring(checkpoint, out, target=target, plugins=plugins, ignore_names=ignore_names, overwrite=overwrite)
    checkpoint = own
    refuse_out(out, (checkpoint,), overwrite=overwrite)
    manifest = read_manifest(checkpoint)
    other = differences(manifest.model.model_dump(mode="json"), target.model.model_dump(mode="json"), "model")
    if other and not ignore_names:
        raise CheckpointError(
            f"{checkpoint} was trained with another config: {'; '.join(other[:3])}; give that one, or --ignore-names "
            "to go by what the checkpoint says"
        )
    with proved(out, overwrite=overwrite, sources=(checkpoint,)) as folder:
        for name in OWN_PARTS:
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, folder / name)
            elif (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
        if (folder / LLM_FOLDER).is_dir():  # with its tokenizer any program opens it, and a config goes on from it
            shutil.copytree(folder / TOKENIZER, folder / LLM_FOLDER, dirs_exist_ok=True)
        content = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
        seal(folder, content)
    return [f"{out} is a model folder, every file as its sha256 says: mmft chat {out}"]


def _check_names(found: Found, model: Model, source: Path) -> None:
    """A projector fits only the very models it was trained between, whatever its shape."""
    ours = {"llm": model.llm.path, "encoder": encoder_path(model)}
    for part, theirs in found.names.items():
        if ours[part] and Path(theirs).name.lower() != Path(ours[part]).name.lower():
            raise CheckpointError(
                f"{source} was trained with the {part} {theirs}, the config has {ours[part]}; give that one, or "
                "--ignore-names where it is the same under another name"
            )


def _check_whole_folders(found: Found, model: Model, source: Path) -> None:
    """A part that was trained whole and saved as a folder is what the projector was trained with, not the base."""
    ours = {"llm": model.llm.path, "encoder": encoder_path(model)}
    fields = {"llm": "model.llm.path", "encoder": "model.vision.encoder.path"}
    for part, folder in found.whole.items():
        if ours[part] and Path(ours[part]).expanduser().resolve() != folder.resolve():
            raise CheckpointError(
                f"{source}: {folder} is the {part} it was trained with, the config has {ours[part]}; set "
                f"{fields[part]} to it"
            )


def _check(found: Found, model: Model, plugins: Plugins, source: Path) -> Any:
    """Names and shapes of everything against the models, adapters with their settings.

    Returns the language model without weights. Raises `CheckpointError` for the first that does not fit.
    """
    if model.vision is None and (found.vision is not None or found.vision_weights):
        raise CheckpointError(f"{source} has weights of a vision encoder, the config no model.vision; give its own")
    outline = outline_of(model)
    encoder: Any = None
    if found.projector:
        _check_projector(found.projector, model, plugins, outline, source)
    elif model.vision is not None:
        raise CheckpointError(f"{source} has no projector, and the config a vision encoder; give a text config")
    if found.llm is not None:
        if not found.llm.settings:
            found.llm.settings = settings_of(found.llm, model.llm.lora, "model.llm.lora", source)
        fit(found.llm, dict(outline.named_modules()), source)
    if found.llm_weights:
        found.llm_weights = llm_state(found.llm_weights, outline, source)
    if found.vision is not None or found.vision_weights:
        assert model.vision is not None  # there is a projector, so it was checked above
        encoder = build_encoder(model.vision, model.hub, plugins)
    if found.vision is not None and model.vision is not None:
        if not found.vision.settings:
            found.vision.settings = settings_of(found.vision, model.vision.lora, "model.vision.lora", source)
        found.vision = vision_adapter(found.vision, encoder, source)
    if found.vision_weights:
        found.vision_weights = vision_state(found.vision_weights, encoder, source)
    return outline


def _check_projector(projector: State, model: Model, plugins: Plugins, outline: Any, source: Path) -> None:
    if model.vision is None:
        raise CheckpointError(f"{source} has a projector, the config no model.vision")
    info = plugins.vision_encoders.get(model.vision.encoder.name).describe(
        **encoder_options(model.vision.encoder, plugins, model.hub)
    )
    weights = [tensor for key, tensor in sorted(projector.items()) if key.endswith("weight")]
    width = outline.get_input_embeddings().weight.shape[1]
    if weights[0].shape[1] != info.hidden_size or weights[-1].shape[0] != width:
        raise CheckpointError(
            f"{source}: its projector maps {weights[0].shape[1]} to {weights[-1].shape[0]} values; the encoder of the "
            f"config gives {info.hidden_size} and its language model takes {width}; give the models it was trained with"
        )
    with torch.device("meta"):
        ours = plugins.projectors.get(Found(projector=projector).projector_name).build(info.hidden_size, width)
    refuse_misfits(misfits(ours.state_dict(), projector), f"{source}: its projector is none of mmft's")


def _write(folder: Path, found: Found, model: Model | None, outline: Any) -> None:
    """Projector, adapters and whole parts under the names of a model folder."""
    from safetensors.torch import save_file

    if found.projector:
        save_file(found.projector, folder / PROJECTOR)
    if found.llm is not None:
        base = model.llm.path if model else found.llm.settings.get("base_model_name_or_path")
        _save_adapter(found.llm, folder / ADAPTER, base=base, causal_lm=True)
    if found.llm_weights:
        assert model is not None
        save_llm(folder / LLM_FOLDER, found.llm_weights, outline, model)
    if found.vision is not None:
        assert model is not None and model.vision is not None
        _save_adapter(found.vision, folder / VISION_ADAPTER, base=encoder_path(model), causal_lm=False)
    if found.vision_weights:
        (folder / VISION_WEIGHTS).parent.mkdir()
        save_file(found.vision_weights, folder / VISION_WEIGHTS)


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


def _complete(folder: Path, found: Found, target: Target, plugins: Plugins) -> None:
    """What makes it a model folder: the tokenizer, and a manifest with the parts as they are."""
    llm, vision = target.model.llm, target.model.vision
    changes: dict[str, Any] = {"lora": _lora(found.llm), "adapter": None, "trainable": False}
    if found.llm_weights:
        changes["quantization"] = "none"
    if vision is not None:
        projector = {"projector": Use(name=found.projector_name), "projector_weights": None, "feature_cache": None}
        vision = vision.model_copy(
            update={**projector, "trainable": False, "lora": _lora(found.vision), "adapter": None}
        )
    model = target.model.model_copy(update={"llm": llm.model_copy(update=changes), "vision": vision})
    load_tokenizer(model.llm, model.hub).save_pretrained(folder / TOKENIZER)
    if target.config is not None:
        write_manifest(folder, target.config.model_copy(update={"model": model}), plugins, target.precision)
    else:
        write_imported(folder, model, target.chat_template, target.precision, plugins)


def write_imported(folder: Path, model: Model, chat_template: str, precision: str, plugins: Plugins) -> None:
    """The manifest of a model that no config of ours trained: it can be talked to and started from, not resumed."""
    owners = {f"chat template {chat_template}": plugins.chat_templates.owner(chat_template)}
    if model.vision:
        encoder, projector = model.vision.encoder.name, model.vision.projector.name
        owners[f"vision encoder {encoder}"] = plugins.vision_encoders.owner(encoder)
        owners[f"projector {projector}"] = plugins.projectors.owner(projector)
    content = {
        "format": FORMAT,
        "mmft": __version__,
        "model": named_from(model, folder).model_dump(mode="json"),
        "chat_template": chat_template,
        "precision": precision,
        "config": {},
        "plugins": {name: plugin.identity for name, plugin in owners.items()},
    }
    seal(folder, content)


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the sha256 of every file there is."""
    content = content | {"files": file_hashes(folder)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")


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


def _lines(found: Found, out: Path, target: Target | None) -> list[str]:
    """What was brought, and how a config uses it."""
    lines = []
    if found.projector:
        lines.append(f'{out / PROJECTOR}: {found.projector_name}; use it with projector_weights=Path("{out}")')
    for part, adapter, name in (("", found.llm, ADAPTER), (" of the vision encoder", found.vision, VISION_ADAPTER)):
        if adapter is not None:
            rank, path = adapter.settings["r"], out / name
            lines.append(f'{path}: LoRA{part} of rank {rank}; go on from it with adapter=Path("{path}")')
    if found.llm_weights:
        lines.append(f'{out / LLM_FOLDER}: the language model; go on from it with path="{out / LLM_FOLDER}"')
    if found.vision_weights:
        lines.append(f"{out / VISION_WEIGHTS}: the vision encoder, as the features need it")
    lines += [f"{path.name}/ holds a whole model: name it in the config instead of the base model"
              for path in found.whole.values()]  # fmt: skip
    if target is not None:
        lines.append(f"{out} is a model folder: mmft chat {out}")
    else:
        lines.append("not held against a model: --for CONFIG compares the shapes and makes a model folder")
    return lines

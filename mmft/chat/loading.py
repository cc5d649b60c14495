"""Every kind of model that can be talked to becomes one `Assistant`.

What training wrote (a run, its final/, a checkpoint), what transformers loads (a text model or LLaVA, a folder or a
name), a PEFT adapter on its base, or parts named one by one. All are built by the builder of training, but for
transformers' own LLaVA, which `hf_llava` gives the same form.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from mmft.config import LLM, Model, Use, Vision
from mmft.data.proof import prove_template
from mmft.data.shape import Shape, describe_model
from mmft.errors import CheckpointError, MmftError, ModelError
from mmft.hf_llava import LLAVA, load_hf_llava
from mmft.hub import failed, load_tokenizer, looks_like_path
from mmft.inference import PRECISIONS, Assistant, find_model, load_assistant
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import MANIFEST, as_trained, checkpoints, read_manifest
from mmft.modeling.llava import LlavaModel
from mmft.modeling.llm import choose_device, compute_dtype
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate

log = logging.getLogger("mmft")
ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR_FILE = "projector.safetensors"
QUANTIZATION = {None: None, "4": "nf4", "8": "int8", "16": "none"}
Quantization: TypeAlias = Literal["none", "nf4", "fp4", "int8"]


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """What a user names, and how it is to be loaded; None is "as it says itself", or what the device has.

    `model` is a run, a model folder, a checkpoint, an adapter, or a transformers model by folder or name; without it
    the newest finished run. `llm` is the base model, where it moved or `model` has none. `bits`: 4, 8 or 16.
    """

    model: str | None = None
    adapter: str | None = None
    llm: str | None = None
    vision_encoder: str | None = None
    projector: str | None = None
    select_layer: int | None = None
    prompt_template: str | None = None
    dtype: str | None = None
    bits: str | None = None
    device: str = "auto"

    @property
    def quantization(self) -> Quantization | None:
        """The name of `bits` in a config."""
        return QUANTIZATION[self.bits]  # type: ignore[return-value]

    def precision(self, device: torch.device) -> torch.dtype:
        """The dtype of a model that does not say one: bf16 on GPUs that have it, else fp16; fp32 on a CPU."""
        return PRECISIONS[self.dtype] if self.dtype else compute_dtype("auto", device)


def load_choice(choice: ModelChoice, plugins: Plugins) -> tuple[str, Assistant]:
    """A name to show, and the model in eval mode. Raises `MmftError` in one line where something is missing."""
    device = _device(choice.device)
    if choice.vision_encoder or choice.projector:
        return _from_parts(choice, plugins, device)
    if choice.adapter and choice.model is None:
        return _from_adapter(choice, plugins, device, choice.adapter)
    trained = _trained_folder(choice.model)
    if trained:
        _refuse(choice, ("adapter", "select_layer"), f"{trained} was written by mmft train and has its own")
        assistant = load_assistant(
            trained, plugins, device=device, precision=choice.dtype, quantization=choice.quantization, llm=choice.llm,
            chat_template=choice.prompt_template,
        )  # fmt: skip
        return str(trained), assistant
    assert choice.model is not None
    if (Path(choice.model) / ADAPTER_CONFIG).is_file() and not (Path(choice.model) / "config.json").is_file():
        return _from_adapter(choice, plugins, device, choice.model)
    return _from_transformers(choice, plugins, device, choice.model)


def _device(requested: str) -> torch.device:
    if requested in ("auto", "cpu"):
        return choose_device(requested)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[requested]:
        raise ModelError(f"--device {requested}: this machine has none that torch can use; leave it out, or give cpu")
    return torch.device(requested)


def _trained_folder(reference: str | None) -> Path | None:
    """The model folder that training wrote, or None where a reference is something else.

    Raises `CheckpointError` where it is a folder that holds no model of any kind, or clearly a path and not there.
    """
    if reference is None:
        return find_model(None)
    folder = Path(reference)
    if any((candidate / MANIFEST).is_file() for candidate in (folder, folder / "final", *checkpoints(folder))):
        return find_model(reference)
    if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        return None
    if folder.exists() or looks_like_path(reference):
        return find_model(reference)  # raises
    return None


def _refuse(choice: ModelChoice, options: tuple[str, ...], why: str) -> None:
    """Raise `ModelError` for an option that would have no effect."""
    for name in options:
        if getattr(choice, name) is not None:
            raise ModelError(f"--{name.replace('_', '-')}: {why}; leave it out")


def _from_transformers(choice: ModelChoice, plugins: Plugins, device: torch.device, path: str) -> tuple[str, Assistant]:
    """A text model, or transformers' LLaVA. What else a folder may hold, transformers refuses by its name."""
    _refuse(choice, ("llm", "select_layer"), f"{path} is a whole model")
    dtype = choice.precision(device)
    if _config_of(path).get("model_type") == LLAVA:
        model, shape = load_hf_llava(path, dtype=dtype, device=device, quantization=choice.quantization)
    else:
        config = Model(llm=_llm(choice, path))
        shape = describe_model(config, plugins)
        model = build_model(config, plugins, info=None, image_id=None, dtype=dtype, device=device)
    if choice.adapter:
        _put_on(model, choice.adapter)
    return (f"{path} with {choice.adapter}" if choice.adapter else path), _assistant(choice, plugins, model, shape)


def _from_adapter(choice: ModelChoice, plugins: Plugins, device: torch.device, folder: str) -> tuple[str, Assistant]:
    """A PEFT folder on the base it names, or on `--llm`. If it has a tokenizer, that is the one it was trained with."""
    _refuse(choice, ("select_layer",), f"{folder} is an adapter of a language model")
    if choice.adapter and choice.model:
        raise ModelError(f"--adapter: {folder} is an adapter itself; name its base, and one adapter")
    path = Path(folder) / ADAPTER_CONFIG
    try:
        named = json.loads(path.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no PEFT adapter: {ADAPTER_CONFIG}: {error}") from error
    base = choice.llm or named
    if not base:
        raise CheckpointError(f"{path} names no base model; give it with --llm")
    config = Model(llm=_llm(choice, str(base)))
    shape = describe_model(config, plugins)
    if (Path(folder) / "tokenizer_config.json").is_file():
        shape = Shape(type(shape.tokenizer).for_model(load_tokenizer(LLM(path=folder))), None)
    model = build_model(config, plugins, info=None, image_id=None, dtype=choice.precision(device), device=device)
    _put_on(model, folder)
    return f"{base} with {folder}", _assistant(choice, plugins, model, shape)


def _put_on(model: LlavaModel, folder: str) -> None:
    from peft import PeftModel

    if not Path(folder).is_dir():
        raise CheckpointError(f"--adapter {folder}: no such folder; give a folder with {ADAPTER_CONFIG}")
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"--adapter {folder}: holds no {ADAPTER_CONFIG}; give a PEFT adapter folder")
    try:
        model.llm = PeftModel.from_pretrained(model.llm, folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"--adapter {folder}: {str(error).splitlines()[0]}") from error


def _from_parts(choice: ModelChoice, plugins: Plugins, device: torch.device) -> tuple[str, Assistant]:
    """A language model, an encoder and a projector, as LLaVA's and XTuner's chat take them."""
    llm, encoder, projector = choice.llm or choice.model, choice.vision_encoder, choice.projector
    if not (llm and encoder and projector):
        given = {"--llm": llm, "--vision-encoder": encoder, "--projector": projector}
        absent = [name for name, value in given.items() if not value]
        raise ModelError(f"a model of parts needs --llm, --vision-encoder and --projector; missing: {absent[0]}")
    beside = Path(projector) if Path(projector).is_dir() else Path(projector).parent
    if (beside / MANIFEST).is_file():
        plugins = as_trained(beside, read_manifest(beside, verify=False), plugins)
    vision = _vision(choice, plugins, encoder, Path(projector), _config_of(llm))
    config = Model(llm=_llm(choice, llm), vision=vision)
    shape = describe_model(config, plugins)
    model = build_model(
        config, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=choice.precision(device),
        device=device,
    )  # fmt: skip
    if choice.adapter:
        _put_on(model, choice.adapter)
    return f"{llm} + {encoder} + {projector}", _assistant(choice, plugins, model, shape)


def _vision(choice: ModelChoice, plugins: Plugins, encoder: str, projector: Path, text: dict[str, Any]) -> Vision:
    """The vision part: from the manifest beside the projector, where it was trained here; else found out."""
    folder, file = (projector, projector / PROJECTOR_FILE) if projector.is_dir() else (projector.parent, projector)
    if not file.is_file():
        raise ModelError(f"--projector {projector}: no such file; give a .safetensors file, or a model folder")
    layer = {} if choice.select_layer is None else {"select_layer": choice.select_layer}
    if (folder / MANIFEST).is_file() and (known := read_manifest(folder, verify=False).model.vision):
        options = {**known.encoder.options, _folder_option(plugins, known.encoder.name): encoder, **layer}
        update = {"encoder": Use(name=known.encoder.name, options=options), "projector_weights": file}
        return known.model_copy(update={**update, "lora": None, "trainable": False, "feature_cache": None})
    kind = str(_config_of(encoder).get("model_type", ""))
    name = next((name for name in plugins.vision_encoders.names() if kind.startswith(name)), "vit")
    use = Use(name=name, options={_folder_option(plugins, name): encoder, **layer})
    try:
        width = plugins.vision_encoders.get(name).describe(**use.options).hidden_size
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"--vision-encoder {encoder}: {str(error).splitlines()[0]}") from error
    text = text.get("text_config", text)
    spec = _projector_of(file, plugins, width, int(text.get("hidden_size", 0)))
    return Vision(encoder=use, projector=Use(name=spec), projector_weights=file)


def _folder_option(plugins: Plugins, name: str) -> str:
    """Which option of a vision encoder takes a folder or a name on a hub."""
    option = plugins.vision_encoders.get(name).hub_option
    if option is None:
        raise ModelError(f"--vision-encoder: {name!r} reads no such folder; give the run's own model folder instead")
    return option


def _projector_of(file: Path, plugins: Plugins, width: int, out: int) -> str:
    """The projector whose weights, with its default options, have the names and shapes of a file's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"--projector {file}: cannot be read: {error}") from error
    for spec in plugins.projectors:
        with torch.device("meta"):
            built = spec.build(width, out)
        if {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == found:
            return spec.name
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(found.items())[:4])
    raise ModelError(
        f"--projector {file}: no projector from {width} (the encoder) to {out} (the language model) has its weights "
        f"({shapes}); tried {', '.join(plugins.projectors.names())}"
    )


def _llm(choice: ModelChoice, path: str) -> LLM:
    return LLM(path=path, quantization=choice.quantization or "none")


def _config_of(path: str) -> dict[str, Any]:
    """config.json of a folder or name, without importing a model. Raises `ModelError` where there is none."""
    from transformers import PretrainedConfig

    try:
        return dict(PretrainedConfig.get_config_dict(path)[0])
    except (OSError, ValueError) as error:
        raise ModelError(failed("model", path, "huggingface", error)) from error


def _assistant(choice: ModelChoice, plugins: Plugins, model: LlavaModel, shape: Shape) -> Assistant:
    """With the template that is asked for, else the tokenizer's own. Raises `DataError` where it has none."""
    template = plugins.chat_templates.get(choice.prompt_template or "auto")
    try:
        bound = template.for_tokenizer(shape.tokenizer.hf)
    except MmftError as error:
        known = "NAME (vicuna for LLaVA-1.5)" if shape.vision else "NAME"
        raise type(error)(f"{error}; for chat: --prompt-template {known}") from error
    if choice.prompt_template and shape.tokenizer.hf.chat_template:
        _note_difference(template, shape)
    return Assistant(model.eval(), shape, bound)


def _note_difference(template: ChatTemplate, shape: Shape) -> None:
    """One line where the template that was asked for is not the model's own; training refuses such a one."""
    if prove_template(template, shape.tokenizer):
        told = "%r is not the chat template this model was made with; leave --prompt-template out for the model's own"
        log.warning(told, template.name)

"""Read what LLaVA, XTuner and TinyLLaVA leave behind: projectors, adapters and trained weights, by our names.

Layouts: haotian-liu/LLaVA@c121f04 llava/train/train.py, InternLM/xtuner@v0.1.23 xtuner/model/{llava,sft}.py,
TinyLLaVA_Factory@53f12c7 tinyllava/model/connector. How files are read is in `files`; whole models, which say
themselves what they are, are in `whole`.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmft.convert.importing.files import State, is_deepspeed, read_deepspeed, read_tensors
from mmft.errors import CheckpointError
from mmft.hub import encoder_path
from mmft.modeling.build import ADAPTER, LLM_FOLDER, PROJECTOR, VISION_ADAPTER, VISION_WEIGHTS
from mmft.modeling.checkpoint import MANIFEST, read_manifest

LORA_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight")
LAYER_KEY = re.compile(r"(?:(\d+)\.)?(weight|bias)")
# What stands before a projector's own keys: LLaVA's, inside peft or not; XTuner's folder and .pth; TinyLLaVA's.
PROJECTOR_KEY = re.compile(r"(?:.*\.)?(?:mm_projector|_connector|projector|model)\.((?:\d+\.)?(?:weight|bias))")
# Where XTuner's pth_to_hf and TinyLLaVA put what was trained whole; XTuner's language model is the folder itself.
WHOLES = (
    (".", "llm"),
    ("llm", "llm"),
    ("language_model", "llm"),
    ("visual_encoder", "encoder"),
    ("vision_tower", "encoder"),
)
FORMS = (
    "an mm_projector.bin, a LLaVA run with non_lora_trainables.bin, a whole LLaVA-1.5 or llava-hf model, a folder with "
    "projector/ (XTuner) or connector/ (TinyLLaVA), XTuner's .pth, a file or a folder, or a model folder of mmft"
)


@dataclass
class Adapter:
    """A LoRA: the settings of its `adapter_config.json`, and {(module, "lora_A" or "lora_B"): weight}."""

    settings: dict[str, Any]
    weights: dict[tuple[str, str], Tensor]


@dataclass
class Found:
    """What a source holds. `names` are the models it says it was trained with; `*_weights` those trained whole."""

    projector: State = field(default_factory=dict)
    llm: Adapter | None = None
    vision: Adapter | None = None
    llm_weights: State = field(default_factory=dict)
    vision_weights: State = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    whole: dict[str, Path] = field(default_factory=dict)  # "llm", "encoder": folders, which are named, not copied

    @property
    def projector_name(self) -> str:
        """`linear` or `mlp2x_gelu`, as a config names it."""
        depth = sum(key.endswith("weight") for key in self.projector)
        return "linear" if depth == 1 else f"mlp{depth}x_gelu"


def read_foreign(source: Path) -> Found:
    """What a file or folder of LLaVA, XTuner, TinyLLaVA or mmft holds. Raises `CheckpointError` where it is none."""
    if source.is_file():
        state = read_tensors(source)
        if source.suffix == ".pth":
            return _xtuner_checkpoint(state, source)
        names = _own_names(source.parent) or _llava_names(source.parent)
        return Found(projector=read_projector(state, source), names=names)
    if (source / MANIFEST).is_file():  # before DeepSpeed's files, which a checkpoint of ours may have beside the model
        return _own_folder(source)
    if is_deepspeed(source):  # XTuner under DeepSpeed: a folder named iter_500.pth
        return _xtuner_checkpoint(read_deepspeed(source), source)
    for name in ("non_lora_trainables.bin", "mm_projector.bin"):
        if (source / name).is_file():
            return _llava_run(source, name)
    for name in ("projector", "connector"):
        if (source / name).is_dir():
            return _folders(source, name)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give {FORMS}")
    raise CheckpointError(f"{source} is nothing to import; give {FORMS}")


def read_projector(state: State, where: Path) -> State:
    """The keys of our projectors, `0.weight`, `2.weight`, or `weight` of a linear one."""
    found: State = {}
    for key, tensor in state.items():
        match = PROJECTOR_KEY.fullmatch(key) or LAYER_KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{where}: {key} is no weight of a projector of linear layers, which mmft has")
        found[match[1] if match.re is PROJECTOR_KEY else key] = tensor.detach().contiguous().clone()
    indices = sorted({int(match[1] or 0) for key in found if (match := LAYER_KEY.fullmatch(key))})
    if not indices or indices != list(range(0, 2 * len(indices), 2)):
        raise CheckpointError(f"{where}: its layers are {indices}; mmft's are 0, 2, 4 with GELU between them")
    if len(indices) == 1:
        found = {key.removeprefix("0."): tensor for key, tensor in found.items()}
    prefixes = [""] if len(indices) == 1 else [f"{index}." for index in indices]
    missing = {f"{prefix}{name}" for prefix in prefixes for name in ("weight", "bias")} - found.keys()
    if missing:
        raise CheckpointError(f"{where}: {min(missing)} is missing")
    return found


def _llava_run(source: Path, name: str) -> Found:
    """A LLaVA training folder: the projector, and the adapter where it was a LoRA run."""
    state = read_tensors(source / name)
    other = [key for key in state if "mm_projector." not in key]
    if other:
        raise CheckpointError(f"{source / name}: also holds {other[0]} ({len(other)} such), which has no place in mmft")
    found = Found(projector=read_projector(state, source / name), names=_llava_names(source))
    if (source / "adapter_config.json").is_file():
        found.llm = _adapter(source)
    elif name == "non_lora_trainables.bin":
        raise CheckpointError(f"{source} has {name} but no adapter_config.json; both belong to a LoRA run")
    return found


def _llava_names(folder: Path) -> dict[str, str]:
    """The models that LLaVA's trainer wrote down, where there are any."""
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or "mm_vision_tower" not in content:  # some other model's
        return {}
    names = {"encoder": content["mm_vision_tower"], "llm": content.get("_name_or_path")}
    return {key: value for key, value in names.items() if isinstance(value, str) and value}


def _own_names(folder: Path) -> dict[str, str]:
    """The models that a model folder of ours names, where there is one."""
    if not (folder / MANIFEST).is_file():
        return {}
    model = read_manifest(folder, verify=False).model
    encoder = encoder_path(model)
    return {"llm": model.llm.path} | ({"encoder": encoder} if encoder else {})


def _own_folder(source: Path) -> Found:
    """A model folder of ours: its projector and its adapters."""
    manifest = read_manifest(source)
    found = Found(names=_own_names(source))
    if (source / PROJECTOR).is_file():
        found.projector = read_projector(read_tensors(source / PROJECTOR), source / PROJECTOR)
    if manifest.model.llm.lora and (source / ADAPTER).is_dir():
        found.llm = _adapter(source / ADAPTER)
    if manifest.model.vision and manifest.model.vision.lora and (source / VISION_ADAPTER).is_dir():
        found.vision = _adapter(source / VISION_ADAPTER)
    if (source / LLM_FOLDER).is_dir():
        found.whole["llm"] = source / LLM_FOLDER
        found.names["llm"] = str(source / LLM_FOLDER)
    if (source / VISION_WEIGHTS).is_file():
        found.vision_weights = read_tensors(source / VISION_WEIGHTS)
    return found


def _folders(source: Path, name: str) -> Found:
    """XTuner's `pth_to_hf` and TinyLLaVA: a folder for each part."""
    folder = source / name
    files = [folder / "model.safetensors", *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    weights = next((path for path in files if path.is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds no weights")
    recorded = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (activation := recorded.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{folder}: its activation is {activation}; the projectors of mmft have gelu")
    found = Found(projector=read_projector(read_tensors(weights), weights))
    if (source / "llm_adapter").is_dir():
        found.llm = _adapter(source / "llm_adapter")
    if (source / "visual_encoder_adapter").is_dir():
        found.vision = _adapter(source / "visual_encoder_adapter")
    for part, adapter in (("llm", found.llm), ("encoder", found.vision)):
        if adapter and adapter.settings.get("base_model_name_or_path"):
            found.names[part] = str(adapter.settings["base_model_name_or_path"])
    found.whole = {part: source / name for name, part in WHOLES if is_model(source / name)}
    return found


def is_model(folder: Path) -> bool:
    """Whether a folder is a whole model as transformers saves one."""
    weights = ("model*.safetensors", "pytorch_model*.bin")
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in weights)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _adapter(folder: Path) -> Adapter:
    settings = _json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or settings.get("modules_to_save"):
        what = {key: settings.get(key) for key in ("peft_type", "bias", "modules_to_save")}
        raise CheckpointError(f"{folder}: only a LoRA without biases or whole modules has a place here, found {what}")
    files = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    weights = next((path for path in files if path.is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds no adapter_model.safetensors or adapter_model.bin")
    return Adapter(settings, _lora_weights(read_tensors(weights), weights))


def _lora_weights(state: State, where: Path) -> dict[tuple[str, str], Tensor]:
    weights = {}
    for key, tensor in state.items():
        match = LORA_KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{where}: {key} is no LoRA weight")
        weights[match[1], match[2]] = tensor
    return weights


def _xtuner_checkpoint(state: State, source: Path) -> Found:
    """XTuner's .pth: only what trained, as `projector.*`, `llm.*` and `visual_encoder.*`, adapters or whole."""
    parts: dict[str, State] = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    unknown = sorted(parts.keys() - {"projector", "llm", "visual_encoder"})
    if unknown or not parts:
        raise CheckpointError(
            f"{source} is no checkpoint of XTuner: its parts are {', '.join(sorted(parts)) or 'none'}"
        )
    found = Found()
    if "projector" in parts:
        found.projector = read_projector(parts["projector"], source)
    found.llm, found.llm_weights = _part(parts.get("llm", {}), source)
    found.vision, found.vision_weights = _part(parts.get("visual_encoder", {}), source)
    return found


def _part(state: State, source: Path) -> tuple[Adapter | None, State]:
    """An adapter, whose settings the file does not hold, or all weights of a part."""
    if any(".lora_" in key for key in state):
        return Adapter({}, _lora_weights(state, source)), {}
    return None, state

"""Read what LLaVA, XTuner and TinyLLaVA leave behind: the weights of projectors and LoRA adapters, by our names.

Pickled files are read for their tensors alone (`weights_only=True`). Layouts: haotian-liu/LLaVA@c121f04
llava/train/train.py, InternLM/xtuner@v0.1.23 xtuner/model/llava.py, TinyLLaVA_Factory@53f12c7
tinyllava/model/connector.
"""

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.errors import CheckpointError

LORA_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight")
LAYER_KEY = re.compile(r"(?:(\d+)\.)?(weight|bias)")
# What stands before a projector's own keys: LLaVA's, inside peft or not; XTuner's folder and .pth; TinyLLaVA's.
PROJECTOR_KEY = re.compile(r"(?:.*\.)?(?:mm_projector|_connector|projector|model)\.((?:\d+\.)?(?:weight|bias))")
FORMS = (
    "an mm_projector.bin, a LLaVA run with non_lora_trainables.bin, a folder with projector/ (XTuner) or connector/ "
    "(TinyLLaVA), or XTuner's .pth"
)
State = dict[str, Tensor]


@dataclass
class Adapter:
    """A LoRA: the settings of its `adapter_config.json`, and {(module, "lora_A" or "lora_B"): weight}."""

    settings: dict[str, Any]
    weights: dict[tuple[str, str], Tensor]


@dataclass
class Found:
    """What a source holds. `names` are the models it says it was trained with."""

    projector: State = field(default_factory=dict)
    llm: Adapter | None = None
    vision: Adapter | None = None
    names: dict[str, str] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)  # folders with whole models, which are named, not copied

    @property
    def projector_name(self) -> str:
        """`linear` or `mlp2x_gelu`, as a config names it."""
        depth = sum(key.endswith("weight") for key in self.projector)
        return "linear" if depth == 1 else f"mlp{depth}x_gelu"


def read_foreign(source: Path) -> Found:
    """What a file or folder of LLaVA, XTuner or TinyLLaVA holds."""
    if source.is_file() and source.suffix != ".pth":
        return Found(projector=_projector(read_tensors(source), source))
    if (source / "mp_rank_00_model_states.pt").is_file():  # XTuner under DeepSpeed: a folder named iter_500.pth
        return _xtuner_checkpoint(read_tensors(source / "mp_rank_00_model_states.pt"), source)
    if source.is_file():
        return _xtuner_checkpoint(read_tensors(source), source)
    for name in ("non_lora_trainables.bin", "mm_projector.bin"):
        if (source / name).is_file():
            return _llava_run(source, name)
    for name in ("projector", "connector"):
        if (source / name).is_dir():
            return _folders(source, name)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give {FORMS}")
    raise CheckpointError(f"{source} is nothing to import; give {FORMS}")


def read_tensors(path: Path) -> State:
    """The tensors of a safetensors or torch file, those of `state_dict` or `module` where it has one.

    Raises `CheckpointError` for a pickle that holds more than tensors: reading it could run code.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than weights, and reading that could run code; save its state_dict alone, or convert "
            f"it where it was made (xtuner convert pth_to_hf): {_reason(error)}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    for key in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no plain table of weights")
    return content


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or str(error).splitlines() or [type(error).__name__])[0]


def _projector(state: State, where: Path) -> State:
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
    found = Found(projector=_projector(state, source / name), names=_llava_names(source))
    if (source / "adapter_config.json").is_file():
        found.llm = _adapter(source)
    elif name == "non_lora_trainables.bin":
        raise CheckpointError(f"{source} has {name} but no adapter_config.json; both belong to a LoRA run")
    return found


def _llava_names(source: Path) -> dict[str, str]:
    try:
        content = json.loads((source / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    names = {"encoder": content.get("mm_vision_tower"), "llm": content.get("_name_or_path")}
    return {key: value for key, value in names.items() if isinstance(value, str) and value}


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
    found = Found(projector=_projector(read_tensors(weights), weights))
    if (source / "llm_adapter").is_dir():
        found.llm = _adapter(source / "llm_adapter")
    if (source / "visual_encoder_adapter").is_dir():
        found.vision = _adapter(source / "visual_encoder_adapter")
    for part, adapter in (("llm", found.llm), ("encoder", found.vision)):
        if adapter and adapter.settings.get("base_model_name_or_path"):
            found.names[part] = str(adapter.settings["base_model_name_or_path"])
    wholes = ("llm", "visual_encoder", "language_model", "vision_tower")
    found.whole = [part for part in wholes if (source / part).is_dir()]
    return found


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
    """XTuner's .pth: only what trained, as `projector.*`, `llm.*lora*`, `visual_encoder.*lora*`."""
    parts: dict[str, State] = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    unknown = sorted(parts.keys() - {"projector", "llm", "visual_encoder"})
    if unknown or "projector" not in parts:
        raise CheckpointError(f"{source} is no LLaVA checkpoint of XTuner: its parts are {', '.join(sorted(parts))}")
    found = Found(projector=_projector(parts["projector"], source))
    for part in ("llm", "visual_encoder"):
        whole = [key for key in parts.get(part, {}) if ".lora_" not in key]
        if whole:
            raise CheckpointError(
                f"{source}: {part} was trained whole ({len(whole)} weights, such as {whole[0]}); write it as folders "
                "with xtuner convert pth_to_hf, and name the folder in the config"
            )
    if "llm" in parts:
        found.llm = Adapter({}, _lora_weights(parts["llm"], source))
    if "visual_encoder" in parts:
        found.vision = Adapter({}, _lora_weights(parts["visual_encoder"], source))
    return found

"""The model folder: what training leaves, and what chat, eval and convert accept.

Public layouts only (PEFT, safetensors, tokenizer files) and `mmft.json`, which says what they are and carries a sha256
of each. A folder is written under a temporary name, synced and renamed, so an unfinished one never bears a final name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmft import __version__
from mmft.config import Model, TrainConfig
from mmft.errors import CheckpointError
from mmft.modeling.build import (
    ADAPTER,
    LLM_FOLDER,
    PROJECTOR,
    VISION_ADAPTER,
    VISION_WEIGHTS,
)
from mmft.modeling.llava import LlavaModel
from mmft.modeling.lora import base_of, is_adapted
from mmft.plugins import Plugins

MANIFEST = "mmft.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """`mmft.json`: the model part of the config, the template, who provided what, and a sha256 for each file."""

    model: Model
    chat_template: str
    precision: str
    config_digest: str
    plugins: dict[str, str]
    files: dict[str, str]


def config_digest(config: TrainConfig) -> str:
    """Of all that decides the weights: model, data and optim, not where the run lives."""
    text = config.model_dump_json(include={"model", "data", "optim"})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_parts(folder: Path, built: LlavaModel, hf_tokenizer: Any) -> None:
    """Write the trained parts and the tokenizer; frozen parts are named by the manifest, not copied."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if is_adapted(built.llm):
        built.llm.save_pretrained(folder / ADAPTER)
    elif _trains(built.llm):
        built.llm.save_pretrained(folder / LLM_FOLDER)
    if built.projector is not None:
        save_file(_state(built.projector), folder / PROJECTOR)
    vision: Any = built.vision
    if vision is not None and is_adapted(vision):
        vision.save_pretrained(folder / VISION_ADAPTER)
    elif vision is not None and _trains(vision):
        (folder / VISION_WEIGHTS).parent.mkdir(exist_ok=True)
        save_file(_state(base_of(vision)), folder / VISION_WEIGHTS)
    hf_tokenizer.save_pretrained(folder / "tokenizer")


def _trains(part: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def write_manifest(folder: Path, config: TrainConfig, plugins: Plugins, precision: str) -> None:
    """Write `mmft.json` over everything that is in the folder."""
    files = {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {
        "format": FORMAT,
        "mmft": __version__,
        "model": config.model.model_dump(mode="json"),
        "chat_template": config.data.chat_template,
        "precision": precision,
        "config_digest": config_digest(config),
        "plugins": _used_plugins(config, plugins),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), "utf-8")


def _used_plugins(config: TrainConfig, plugins: Plugins) -> dict[str, str]:
    """Which distribution provided each name that the model depends on."""
    used = {f"chat template {config.data.chat_template}": plugins.chat_templates.owner(config.data.chat_template)}
    if config.model.vision:
        encoder, projector = config.model.vision.encoder.name, config.model.vision.projector.name
        used[f"vision encoder {encoder}"] = plugins.vision_encoders.owner(encoder)
        used[f"projector {projector}"] = plugins.projectors.owner(projector)
    return {name: plugin.distribution or plugin.name for name, plugin in used.items()}


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """The manifest of a model folder; with `verify` every file's sha256 is compared.

    Raises `CheckpointError` naming the first file that is missing or differs.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text("utf-8"))
        manifest = Manifest(
            Model.model_validate(content["model"]),
            content["chat_template"],
            content["precision"],
            content["config_digest"],
            content["plugins"],
            content["files"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is no complete model folder: {MANIFEST}: {_reason(error)}") from error
    if verify:
        for name, expected in manifest.files.items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: {name} is missing")
            if _sha256(folder / name) != expected:
                raise CheckpointError(f"{folder}: {name} is damaged (its sha256 is not the one in {MANIFEST})")
    return manifest


def _reason(error: Exception) -> str:
    return "does not exist" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` in one rename, when everything in it is on disk."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    publish(temporary, target)


def publish(temporary: Path, target: Path) -> None:
    """Sync every file, then rename the folder over what bore the name before."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    replaced = target.with_name(f".{target.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(replaced, ignore_errors=True)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first, complete or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))

"""The model folder: what training leaves, and what chat, eval and convert accept.

Public layouts only (PEFT, safetensors, tokenizer files) and `mmft.json`, which says what they are and carries a sha256
of each. A folder is written under a temporary name, synced and renamed, so an unfinished one never bears a final name.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft import __version__
from mmft.config import Model, TrainConfig
from mmft.errors import CheckpointError
from mmft.folders import MANIFEST as MANIFEST
from mmft.folders import checkpoints as checkpoints
from mmft.hub import named_from, seen_from
from mmft.modeling.build import (
    ADAPTER,
    LLM_FOLDER,
    PROJECTOR,
    VISION_ADAPTER,
    VISION_WEIGHTS,
)
from mmft.modeling.llava import LlavaModel
from mmft.modeling.lora import is_adapted
from mmft.plugins import Plugins

log = logging.getLogger("mmft")
FORMAT = 1
CANNOT_WRITE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR,
    errno.ENAMETOOLONG,
)  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """`mmft.json`: the config that decided the weights, the template, who provided what, and a sha256 for each file."""

    model: Model
    chat_template: str
    precision: str
    config: dict[str, Any]
    plugins: dict[str, str]
    files: dict[str, str]


def decides_weights(config: TrainConfig) -> dict[str, Any]:
    """What of a config decides the weights, and not where the run lives, how it is read or what it is held to."""
    decisive: dict[str, Any] = config.model_dump(mode="json", include={"model", "data", "optim"})
    del decisive["data"]["validation"], decisive["data"]["num_workers"]
    return decisive | {"runtime": config.runtime.model_dump(mode="json", include={"seed", "precision"})}


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """`optim.lr: 0.01 there, 0.001 here` for each value in which two dumped configs differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        inner = (differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key) for key in keys)
        return [line for lines in inner for line in lines]
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{path}.{i}")]
    return [] if theirs == ours else [f"{path}: {theirs!r} there, {ours!r} here"]


def whole(tensor: Tensor) -> Tensor:
    """A weight on the CPU, where every process holds all of it."""
    return tensor.detach().cpu()


def gather_parts(
    built: LlavaModel, full: Callable[[Tensor], Tensor] = whole, *, keep: bool = True
) -> dict[str, dict[str, Tensor]]:
    """What `save_parts` writes: the state of each part that trains, and of the projector.

    Sharded weights are put together by `full`, for which every process must be here; `keep=False` on those that do not
    write. Of a part with an adapter only the adapter is gathered.
    """
    gathered: dict[str, dict[str, Tensor]] = {}
    for name, part in built.parts().items():
        adapted = is_adapted(part)
        if not (_trains(part) or name == "projector"):
            continue
        state = gathered.setdefault(name, {})
        for key, tensor in part.state_dict(keep_vars=True).items():
            if adapted and not tensor.requires_grad:
                continue
            value = full(tensor)
            if keep:
                state[key] = value.contiguous()
    return gathered


def save_parts(
    folder: Path, built: LlavaModel, hf_tokenizer: Any, gathered: dict[str, dict[str, Tensor]] | None = None
) -> None:
    """Write the trained parts and the tokenizer; frozen parts are named by the manifest, not copied."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = gather_parts(built) if gathered is None else gathered
    if is_adapted(built.llm):
        built.llm.save_pretrained(folder / ADAPTER, state_dict=state["llm"])
    elif _trains(built.llm):
        built.llm.save_pretrained(folder / LLM_FOLDER, state_dict=state["llm"])
        hf_tokenizer.save_pretrained(folder / LLM_FOLDER)  # a plain model that any program opens
    if built.projector is not None:
        save_file(state["projector"], folder / PROJECTOR)
    vision: Any = built.vision
    if vision is not None and is_adapted(vision):
        vision.save_pretrained(folder / VISION_ADAPTER, state_dict=state["vision"])
    elif vision is not None and _trains(vision):
        (folder / VISION_WEIGHTS).parent.mkdir(exist_ok=True)
        save_file(state["vision"], folder / VISION_WEIGHTS)
    hf_tokenizer.save_pretrained(folder / "tokenizer")


def _trains(part: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def write_manifest(folder: Path, config: TrainConfig, plugins: Plugins, precision: str) -> None:
    """Write `mmft.json` over everything that is in the folder."""
    manifest = {
        "format": FORMAT,
        "mmft": __version__,
        "model": named_from(config.model, folder).model_dump(mode="json"),
        "chat_template": config.data.chat_template,
        "precision": precision,
        "config": decides_weights(config),
        "plugins": used_plugins(config, plugins),
        "files": file_hashes(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), "utf-8")


def used_plugins(config: TrainConfig, plugins: Plugins) -> dict[str, str]:
    """Which distribution in which version, or which file, provided each name that the weights depend on."""
    used = {f"chat template {config.data.chat_template}": plugins.chat_templates.owner(config.data.chat_template)}
    for dataset in config.data.datasets:
        used[f"data source {dataset.source.name}"] = plugins.datasets.owner(dataset.source.name)
        used[f"data map {dataset.data_map}"] = plugins.data_maps.owner(dataset.data_map)
    if config.model.vision:
        encoder, projector = config.model.vision.encoder.name, config.model.vision.projector.name
        used[f"vision encoder {encoder}"] = plugins.vision_encoders.owner(encoder)
        used[f"projector {projector}"] = plugins.projectors.owner(projector)
    return {name: plugin.identity for name, plugin in used.items()}


def as_trained(folder: Path, manifest: Manifest, plugins: Plugins) -> Plugins:
    """The plugins for the model of a folder: a name that several offer is that of the plugin it was trained with.

    One warning where another plugin, or another version of it, now offers what it was trained with.
    """
    if manifest.plugins == plugins.recorded:
        return plugins
    known = plugins.as_trained(manifest.plugins)
    replaced: dict[tuple[str, str], list[str]] = {}
    for catalog in (known.chat_templates, known.vision_encoders, known.projectors):
        for name, was, now in catalog.replaced():
            replaced.setdefault((was, now), []).append(name)
    if replaced:
        told = "; ".join(f"{', '.join(names)} with {was}, here is {now}" for (was, now), names in replaced.items())
        log.warning("%s was trained with other plugins: %s; it may answer otherwise than it did", folder, told)
    return known


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """The manifest of a model folder; with `verify` every file's sha256 is compared.

    Raises `CheckpointError` naming the first file that is missing or differs.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text("utf-8"))
        manifest = Manifest(
            seen_from(Model.model_validate(content["model"]), folder),
            content["chat_template"],
            content["precision"],
            content.get("config", {}),  # models of before 0.1 can be talked to, not gone on with
            content["plugins"],
            content["files"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is no complete model folder: {MANIFEST}: {_reason(error)}") from error
    if verify:
        for name, expected in manifest.files.items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: {name} is missing")
            if sha256(folder / name) != expected:
                raise CheckpointError(f"{folder}: {name} is damaged (its sha256 is not the one in {MANIFEST})")
    return manifest


def _reason(error: Exception) -> str:
    return "does not exist" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` in one rename, when everything in it is on disk; else it goes."""
    place = target.resolve()
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with or_nothing(temporary, target):
            temporary.mkdir(parents=True)
            yield temporary
            publish(temporary, place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def or_nothing(temporary: Path, target: Path, *, resumable: bool = True) -> Iterator[None]:
    """Where writing fails (a full disk, no permission), remove what is there of it, and say so in one line.

    With `resumable` the target belongs to a run, and the line says from which checkpoint that goes on. Without, other
    things happen in the block too, and an error that is not of writing passes. Raises `CheckpointError`.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has only RuntimeError for a file it cannot write
        if isinstance(error, RuntimeError) and not re.search("file write|iostream|writing", str(error)):
            raise
        if not resumable and not _is_of_writing(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        advice = _how_to_go_on(target.parent) if resumable else "make room on the disk, or choose another place"
        raise CheckpointError(f"{target} cannot be written: {reason}; {advice}") from error


def _is_of_writing(error: Exception) -> bool:
    """Whether an error says that a file cannot be written; those about a model not found have no number."""
    if isinstance(error, OSError):
        return error.errno in CANNOT_WRITE
    return isinstance(error, RuntimeError) or re.search(r"\bserializ|os error", str(error)) is not None


def _how_to_go_on(run: Path) -> str:
    whole_ones = [path for path in checkpoints(run) if (path / MANIFEST).is_file()]
    kept = f"{whole_ones[0]} is whole: " if whole_ones else "there is no checkpoint before it: "
    return f"{kept}make room on the disk and {'go on with --resume' if whole_ones else 'begin anew'}"


def publish(temporary: Path, target: Path) -> None:
    """Sync every file, then rename the folder over what bore the name before, which stays where that fails."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    replaced = target.with_name(f".{target.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    there = target.exists()
    if there:
        target.rename(replaced)
    try:
        temporary.rename(target)
    except BaseException:
        if there:
            replaced.rename(target)
        raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(replaced, ignore_errors=True)

"""Others' weight files, read for their tensors alone: safetensors, torch's pickles, DeepSpeed's folders of shards.

A pickle is only ever read with `weights_only=True`, which runs nothing that is in it. What XTuner and DeepSpeed keep
beside the weights (histories of the loss, loss scalers) is not wanted: each such class is named in `BESIDE`, and in its
place stands one that holds nothing.
"""

import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.errors import CheckpointError

State = dict[str, Tensor]

# What open-mmlab/mmengine@v0.10.7 (logging/history_buffer.py, its arrays and, through getattr, its methods) and
# deepspeedai/DeepSpeed@v0.19 (runtime/engine.py, runtime/zero) pickle beside the tensors.
BESIDE = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
MODEL_FILES, OPTIMIZER_FILES = "*mp_rank_00_model_states.pt", "*zero_pp_rank_*_mp_rank_00_optim_states.pt"


class Nothing:
    """In the place of an object that is not wanted: takes whatever it is made from and keeps none of it."""

    def __new__(cls, *parts: Any, **named: Any) -> "Nothing":
        """See the class."""
        return super().__new__(cls)

    def __init__(self, *parts: Any, **named: Any) -> None:
        """See the class."""

    def __setstate__(self, state: Any) -> None:
        """See the class."""


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
    content = _unpickled(path)
    for key in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no plain table of weights")
    return dict(content)


def _unpickled(path: Path) -> Any:
    """What a torch file holds, its tensors mapped from the file where its format allows it."""
    try:
        with torch.serialization.safe_globals([(Nothing, name) for name in BESIDE]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise _cut_off(path) from error
        raise CheckpointError(
            f"{path}: holds more than weights, and reading that could run code; save its state_dict alone, or convert "
            f"it where it was made (xtuner convert pth_to_hf): {_reason(error)}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, TypeError, KeyError) as error:
        if isinstance(error, EOFError) or "zip archive" in str(error):
            raise _cut_off(path) from error
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error


def _cut_off(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: is empty or cut off ({path.stat().st_size:,} bytes); copy it again")


def _is_zip(path: Path) -> bool:
    """Whether torch wrote it in its present format; older files are read whole."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or str(error).splitlines() or [type(error).__name__])[0]


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is what DeepSpeed's `save_checkpoint` writes: XTuner's `iter_500.pth/` is one."""
    return folder.is_dir() and any(_tagged(folder).glob(MODEL_FILES))


def _tagged(folder: Path) -> Path:
    """DeepSpeed's own layout has a folder for each step and `latest` with the name of one; XTuner's has neither."""
    latest = folder / "latest"
    return folder / Path(latest.read_text("utf-8").strip()).name if latest.is_file() else folder


def read_deepspeed(folder: Path) -> State:
    """The trained weights of a DeepSpeed checkpoint of ZeRO-1, 2 or 3, in float32, put together from all shards.

    The arithmetic of deepspeedai/DeepSpeed@v0.19 `utils/zero_to_fp32.py`, which unpickles whatever is there. Raises
    `CheckpointError` where a shard is missing or does not hold what the checkpoint says.
    """
    where = _tagged(folder)
    head = _table(min(where.glob(MODEL_FILES), key=_rank), "module")
    tables = (_table(path, "optimizer_state_dict") for path in sorted(where.glob(OPTIMIZER_FILES), key=_rank))
    shards = [table["optimizer_state_dict"] for table in tables]
    module = {key: tensor for key, tensor in head["module"].items() if isinstance(tensor, Tensor)}
    if not shards:
        if any(tensor.numel() == 0 for tensor in module.values()):
            raise CheckpointError(f"{folder}: its weights are in shards, and it holds no *_optim_states.pt with them")
        return module
    if not any(key in shards[0] for key in ("fp32_flat_groups", "single_partition_of_fp32_groups")):
        return module  # without ZeRO every process has all of it
    count = shards[0].get("partition_count", len(shards))
    wanted = max(count) if isinstance(count, list) else int(count)
    if wanted != len(shards):
        raise CheckpointError(f"{folder}: written by {wanted} processes, found the shards of {len(shards)}; give all")
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise CheckpointError(f"{folder}: its shards do not belong together: they are of different ZeRO stages")
    if not isinstance(head.get("param_shapes"), list):
        raise CheckpointError(f"{folder}: its model states hold no param_shapes, by which the shards are put together")
    if "fp32_flat_groups" in shards[0]:
        masters = dict(_stage3(head["param_shapes"], [shard["fp32_flat_groups"] for shard in shards], folder))
    else:
        groups = [shard["single_partition_of_fp32_groups"] for shard in shards]
        paddings = shards[0].get("param_alignment_paddings")
        masters = dict(_stage2(head["param_shapes"], groups, paddings, folder))
    shared = head.get("shared_params") or {}
    masters |= {name: masters[other] for name, other in dict(shared).items() if other in masters}
    rest = {key: tensor for key, tensor in module.items() if key not in masters and tensor.numel()}
    return rest | masters


def _table(path: Path, key: str) -> dict[str, Any]:
    """What a file of a DeepSpeed checkpoint holds, with a table under `key`."""
    content = _unpickled(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        raise CheckpointError(f"{path}: is no file of a DeepSpeed checkpoint: it holds no table {key!r}")
    return content


def _rank(path: Path) -> int:
    found = re.search(r"pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else -1


def _stage2(
    shapes: Sequence[Mapping[str, torch.Size]], ranks: Sequence[Sequence[Tensor]], paddings: Any, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO-1 and 2 lay a group's weights end to end and cut the whole into one piece a process."""
    if any(len(groups) != len(shapes) for groups in ranks):
        raise CheckpointError(f"{folder}: {len(shapes)} groups of weights, {len(ranks[0])} in its shards")
    for number, named in enumerate(shapes):
        flat, at = torch.cat([groups[number] for groups in ranks]), 0
        for place, (name, shape) in enumerate(named.items()):
            size = math.prod(shape)
            _check_room(at + size, flat, name, folder)
            yield name, flat[at : at + size].view(shape).clone()
            at += size + (int(paddings[number][place]) if paddings else 0)
        if flat.numel() - at >= 2 * len(ranks):  # it is filled up to a multiple of that
            raise CheckpointError(f"{folder}: {flat.numel() - at} numbers of its shards belong to no weight")


def _stage3(
    shapes: Sequence[Mapping[str, torch.Size]], ranks: Sequence[Sequence[Tensor]], folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO-3 cuts every weight into one piece a process, the last one filled up."""
    flats, at = [torch.cat(list(groups)) for groups in ranks], 0
    for name, shape in ((name, shape) for named in shapes for name, shape in named.items()):
        size = math.prod(shape)
        piece = math.ceil(size / len(flats))
        for flat in flats:
            _check_room(at + piece, flat, name, folder)
        yield name, torch.cat([flat[at : at + piece] for flat in flats])[:size].view(shape).clone()
        at += piece
    if any(flat.numel() != at for flat in flats):
        raise CheckpointError(f"{folder}: {flats[0].numel() - at} numbers of its shards belong to no weight")


def _check_room(end: int, flat: Tensor, name: str, folder: Path) -> None:
    if end > flat.numel():
        raise CheckpointError(f"{folder}: its shards end at {flat.numel()} numbers, within {name}; one is cut short")

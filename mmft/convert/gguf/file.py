"""Writing a GGUF file tensor by tensor: what type each tensor gets, and one of them in memory at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmft.errors import CheckpointError, ModelError

F16_MAX = 65504.0


@dataclass(frozen=True)
class Quant:
    """A type of weights: ggml's name for it, llama.cpp's number of a file of it, and what the parity gate allows.

    `tolerance` is what the logits may differ by, as a part of their size (`parity.TOLERANCE`). Measured on tiny random
    models of six families with rows of 32 and 64, and on SmolLM2-135M: f32 and f16 4e-3 and 8e-3 (llama.cpp keeps keys
    and values in 16 bits whatever the weights are), bf16 2e-2, q8_0 6e-2 and 0.13 (llama.cpp rounds what goes into such
    a matrix to 8 bits too), q5 0.36, q4 0.6.

    Two questions are asked with these numbers. Is it the same model: vocabulary, chat template, adapters, picture side?
    That f32 and f16 alone can tell, at 0.02: a lost adapter gives 0.1 and more, CLS tokens out of place 0.32. Every
    other type is written after the same parts passed there (`PROVES`). And how much did the rounding cost? The wider
    tolerances refuse a loss that is beyond rounding, and nothing finer; `parity.json` has the numbers for the reader.
    """

    ggml: str
    file_type: str
    tolerance: float


QUANTS = {
    "f32": Quant("F32", "ALL_F32", 2e-2),
    "f16": Quant("F16", "MOSTLY_F16", 2e-2),
    "bf16": Quant("BF16", "MOSTLY_BF16", 5e-2),
    "q8_0": Quant("Q8_0", "MOSTLY_Q8_0", 0.2),
    "q5_1": Quant("Q5_1", "MOSTLY_Q5_1", 0.5),
    "q5_0": Quant("Q5_0", "MOSTLY_Q5_0", 0.5),
    "q4_1": Quant("Q4_1", "MOSTLY_Q4_1", 0.8),
    "q4_0": Quant("Q4_0", "MOSTLY_Q4_0", 0.8),
}
ROUNDED = ("f32", "f16", "bf16")  # no blocks: every tensor fits
PROVED_ALONE = ("f32", "f16")  # fine enough to show a mistake beside the rounding
# The type in which a model's structure is proved before its weights are rounded further. bf16 has the range of f32.
PROVES = {name: "f32" if name == "bf16" else "f16" for name in QUANTS if name not in PROVED_ALONE}


class RangeError(ModelError):
    """Weights are beyond the range of 16-bit floats."""


def find_quant(name: str) -> Quant:
    """The type of that name. Raises `ModelError` for those llama.cpp alone can write, with its command."""
    if name in QUANTS:
        return QUANTS[name]
    raise ModelError(
        f"--quant {name}: written here are {', '.join(QUANTS)}; for others write f16, then "
        f"`llama-quantize OUT/model-f16.gguf OUT/model-{name}.gguf {name.upper()}` (a tool of llama.cpp)"
    )


@dataclass(frozen=True)
class Piece:
    """A tensor of the file: its name, its shape (slowest first, as torch's) and what gives its values as float32."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], NDArray[np.float32]]
    always_float: bool = False  # small, and read by code that knows float32 alone

    @classmethod
    def of(cls, name: str, tensor: Tensor, *, always_float: bool = False) -> "Piece":
        """A tensor as it is."""
        return cls(name, tuple(tensor.shape), lambda: as_floats(tensor), always_float)


def as_floats(tensor: Tensor) -> NDArray[np.float32]:
    """float32 on the CPU, contiguous."""
    result: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return result


def ggml_type(piece: Piece, quant: str, *, head: str) -> Any:
    """The type of one tensor: vectors stay float32, and the head keeps 8 bits, as llama.cpp's own files have it.

    Rows that are no multiple of the block become 8-bit, or 16-bit floats where that does not fit either.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if piece.always_float or len(piece.shape) < 2 or piece.name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[QUANTS[quant].ggml]
    if quant in ROUNDED:
        return wanted
    choices = (GGMLQuantizationType.Q8_0,) if piece.name == head else (wanted, GGMLQuantizationType.Q8_0)
    fitting = (one for one in choices if piece.shape[-1] % GGML_QUANT_SIZES[one][0] == 0)
    return next(fitting, GGMLQuantizationType.F16)


def write_file(path: Path, writer: Any, pieces: Sequence[Piece], quant: str, *, head: str = "output.weight") -> None:
    """Close a `gguf.GGUFWriter` that has its keys: names and shapes first, then one tensor after another.

    `head` is the tensor that gives the logits. Raises `RangeError` for values that 16-bit floats do not hold,
    `CheckpointError` where the disk takes no more.
    """
    from gguf import GGMLQuantizationType, quants

    types = [ggml_type(piece, quant, head=head) for piece in pieces]
    for piece, kind in zip(pieces, types, strict=True):
        _announce(writer, piece, kind)
    try:
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, kind in zip(pieces, types, strict=True):
            values = piece.values()
            if kind == GGMLQuantizationType.F16 and float(np.abs(values).max(initial=0)) > F16_MAX:
                raise RangeError(f"{piece.name} has values beyond the range of 16-bit floats; choose --quant bf16")
            writer.write_tensor_data(quants.quantize(values, kind))
        writer.close()
    except OSError as error:  # numpy's, of a full disk, has no number and no file
        said = error.strerror or str(error)
        raise CheckpointError(f"{path} cannot be written: {said}; make room, or choose another OUT") from error


def _announce(writer: Any, piece: Piece, kind: Any) -> None:
    """Name, shape and size of a tensor that is written later."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape

    block, size = GGML_QUANT_SIZES[kind]
    in_bytes = kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    shape = quant_shape_to_byte_shape(piece.shape, kind) if in_bytes else piece.shape
    dtype = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8)
    nbytes = int(np.prod(piece.shape, dtype=np.int64)) // block * size
    writer.add_tensor_info(piece.name, shape, np.dtype(dtype), nbytes, raw_dtype=kind)

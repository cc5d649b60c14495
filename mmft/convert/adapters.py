"""XTuner's forms: one PEFT adapter onto one base model, and a large model folder cut into smaller files."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.convert.parity import Outcome, Report, proved, settle, tolerance_for
from mmft.errors import CheckpointError, ModelError
from mmft.inference import PRECISIONS

TEXT = "What is the capital of France? 1 2 3 — 你好"


def merge_adapter(
    base: str,
    adapter: Path,
    out: Path,
    *,
    is_clip: bool = False,
    dtype: str | None = None,
    device: torch.device,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
) -> Report:
    """Merge a PEFT adapter into a language model, or with `is_clip` into a vision encoder, and save it with its files.

    Compared before and after on a text or a picture. Raises `CheckpointError` for an adapter that does not fit.
    """
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} is no PEFT adapter: it has no adapter_config.json")
    wanted = PRECISIONS[dtype] if dtype else None
    with proved(out, overwrite=overwrite) as temporary:
        model, files = _load(base, is_clip=is_clip, dtype=wanted, device=device)
        inputs = _inputs(files, model, is_clip=is_clip)
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{adapter}: the adapter does not fit {base}: {str(error).splitlines()[0]}"
            ) from error
        before = _outputs(adapted, inputs)
        merged: Any = adapted.merge_and_unload(safe_merge=True)
        merged.save_pretrained(temporary, max_shard_size=max_shard_size)
        files.save_pretrained(temporary)
        precision = next(merged.parameters()).dtype
        del adapted, merged, model
        again, _ = _load(str(temporary), is_clip=is_clip, dtype=precision, device=device)
        report = _compare(before, _outputs(again, inputs), precision)
        settle(report, temporary, out)
    return report


def split(source: Path, out: Path, *, max_shard_size: str = "2GB", overwrite: bool = False) -> list[str]:
    """Write a model folder again with weight files of at most `max_shard_size`, one of them in memory at a time.

    Returns the names of the weight files. Raises `CheckpointError` where the folder holds no safetensors.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import safe_open
    from safetensors.torch import save_file

    where = {key: path for path in sorted(source.glob("*.safetensors")) for key in _sizes(path)}
    if not where:
        raise CheckpointError(f"{source} holds no safetensors; give a folder saved by save_pretrained")
    sizes = {key: size for path in sorted(set(where.values())) for key, size in _sizes(path).items()}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with proved(out, overwrite=overwrite) as temporary:
        for name, keys in plan.filename_to_tensors.items():
            shard: dict[str, Tensor] = {}
            for path in sorted({where[key] for key in keys}):
                with safe_open(path, "pt") as file:
                    shard |= {key: file.get_tensor(key) for key in keys if where[key] == path}
            save_file(shard, temporary / name, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / path.name)
    return sorted(plan.filename_to_tensors)


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, from the file's header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        key: one["data_offsets"][1] - one["data_offsets"][0] for key, one in header.items() if key != "__metadata__"
    }


def _load(path: str, *, is_clip: bool, dtype: torch.dtype | None, device: torch.device) -> tuple[Any, Any]:
    """The model and what is saved beside it: tokenizer or image processor."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": dtype or "auto"}
    try:
        if not is_clip:
            return (
                AutoModelForCausalLM.from_pretrained(path, **options).to(device).eval(),
                AutoTokenizer.from_pretrained(path),
            )
        config = AutoConfig.from_pretrained(path)
        config = getattr(config, "vision_config", config)
        model = AutoModel.from_pretrained(path, config=config, **options)
        return model.to(device).eval(), AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: cannot load: {str(error).splitlines()[0]}") from error


def _inputs(files: Any, model: Any, *, is_clip: bool) -> dict[str, Tensor]:
    if not is_clip:
        ids: Tensor = files(TEXT, return_tensors="pt")["input_ids"]
        return {"input_ids": ids.to(model.device)}
    from PIL import Image

    pixels: Tensor = files(images=Image.linear_gradient("L").convert("RGB"), return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels.to(model.device, model.dtype)}


@torch.no_grad()
def _outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """float32[T, V]: logits, or an encoder's last hidden state."""
    result: Tensor = model(**inputs)[0]
    return result[0].float().cpu()


def _compare(before: Tensor, after: Tensor, dtype: torch.dtype) -> Report:
    difference, size = (after - before).abs(), float((before - before.mean(1, keepdim=True)).square().mean().sqrt())
    relative = float(difference.square().mean().sqrt()) / max(size, 1e-12)
    same = bool((before.argmax(1) == after.argmax(1)).all())
    outcome = Outcome("one input", True, 0.0, float(difference.max()), relative, 0, same, "")
    tolerance = tolerance_for(dtype, "none")
    refusal = "" if relative <= tolerance else f"the outputs differ by {relative:.2g} of their size"
    return Report(not refusal, str(dtype).removeprefix("torch."), tolerance, (outcome,), refusal)

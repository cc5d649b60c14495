"""XTuner's forms: one PEFT adapter onto one base model, and a large model folder cut into smaller files."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmft.convert.parity import PARITY, Outcome, Report, proved, settle, tolerance_for, unverified
from mmft.convert.probes import probes
from mmft.data.proof_cases import as_messages
from mmft.errors import CheckpointError, ModelError
from mmft.inference import PRECISIONS
from mmft.modeling.build import LLM_FOLDER
from mmft.modeling.checkpoint import MANIFEST
from mmft.types import Conversation

INDEX = "model.safetensors.index.json"
POSITIONS = 32  # the last of each text that are compared: whole, a long one is a gigabyte where the vocabulary is large
Probes = list[tuple[str, Conversation]]
Asked = dict[str, dict[str, Tensor]]  # what a model is given, by the name of the probe


def merge_adapter(
    base: str,
    adapter: Path,
    out: Path,
    *,
    is_clip: bool = False,
    dtype: str | None = None,
    device: torch.device,
    max_shard_size: str = "2GB",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Report:
    """Merge a PEFT adapter into a language model, or with `is_clip` into a vision encoder, and save it with its files.

    Compared before and after on the texts of the probe set, or its pictures. Raises `CheckpointError` for an adapter
    that does not fit, or that changes nothing.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} is no PEFT adapter: it has no adapter_config.json")
    load = partial(_load, is_clip=is_clip, device=device, trust_remote_code=trust_remote_code)
    with proved(out, overwrite=overwrite, sources=(base, adapter)) as temporary, probes(pictures=is_clip) as asked:
        model, files = load(base, dtype=PRECISIONS[dtype] if dtype else None)
        inputs, left_out = _pictures(files, model, asked) if is_clip else _texts(files, model, asked)
        untouched = _outputs(model, inputs)
        adapted = _adapted(model, adapter, base)
        before = _outputs(adapted, inputs)
        if all(torch.equal(untouched[name], before[name]) for name in before):
            raise CheckpointError(f"{adapter} changes nothing in {base}: its weights are those of an untrained adapter")
        try:
            merged: Any = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, AttributeError) as error:  # not finite, or of a kind that has no merged form
            raise CheckpointError(f"{adapter} cannot be merged into {base}: {_line(error)}") from error
        merged.save_pretrained(temporary, max_shard_size=max_shard_size)
        files.save_pretrained(temporary)
        precision = next(merged.parameters()).dtype
        del adapted, merged, model
        again, _ = load(str(temporary), dtype=precision)
        report = _compare(before, _outputs(again, inputs), precision, left_out)
        settle(report, temporary, out)
    return report


def _adapted(model: Any, adapter: Path, base: str) -> Any:
    """The model with the adapter, every weight of it in its place. PEFT itself only warns.

    Adapters of encoders have a level `vision_model.` more where an older transformers wrote them.
    """
    from peft import PeftConfig, PeftModel

    renamed = {} if hasattr(model, "vision_model") else {r"^vision_model\.": ""}
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        adapted = PeftModel(model, config)
        result = adapted.load_adapter(str(adapter), "default", torch_device=str(model.device), key_mapping=renamed)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{adapter}: the adapter does not fit {base}: {_line(error)}") from error
    wrong = [("it has", key) for key in result.unexpected_keys] + [("it lacks", key) for key in result.missing_keys]
    if wrong:
        raise CheckpointError(
            f"{adapter}: the adapter does not fit {base}: {wrong[0][0]} {wrong[0][1]} ({len(result.unexpected_keys)} "
            f"weights have no place, {len(result.missing_keys)} are missing); give the model it was trained on"
        )
    return adapted.eval()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def split(source: Path, out: Path, *, max_shard_size: str = "2GB", overwrite: bool = False) -> list[str]:
    """Write a model folder again with weight files of at most `max_shard_size`, one of them in memory at a time.

    Returns the names of the weight files. Raises `CheckpointError` where the folder holds no safetensors of a model.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import safe_open
    from safetensors.torch import save_file

    if (source / MANIFEST).is_file():
        raise CheckpointError(
            f"{source} is a model folder of mmft, of several parts; use `mmft convert merge` with --max-shard-size, or "
            f"split {source / LLM_FOLDER} where there is one"
        )
    where = {key: path for path in _weight_files(source) for key in _sizes(path)}
    if not where:
        raise CheckpointError(f"{source} holds no model*.safetensors; give a folder saved by save_pretrained")
    sizes = {key: size for path in sorted(set(where.values())) for key, size in _sizes(path).items()}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with proved(out, overwrite=overwrite, sources=(source,)) as temporary:
        for name, keys in plan.filename_to_tensors.items():
            shard: dict[str, Tensor] = {}
            for path in sorted({where[key] for key in keys}):
                with safe_open(path, "pt") as file:
                    shard |= {key: file.get_tensor(key) for key in keys if where[key] == path}
            save_file(shard, temporary / name, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (temporary / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
        _copy_others(source, temporary)
        if not (temporary / PARITY).is_file():
            unverified(temporary, out, "its weight files were only cut; no model was asked", "")
    return sorted(plan.filename_to_tensors)


def _weight_files(source: Path) -> list[Path]:
    """The files that transformers would read: the whole one, else those of the index, else the numbered ones."""
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    if not (source / INDEX).is_file():
        return sorted(source.glob("model*.safetensors"))
    try:
        names = set(json.loads((source / INDEX).read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source / INDEX} is no index of weight files: {_line(error)}") from error
    missing = sorted(name for name in names if not (source / name).is_file())
    if missing:
        raise CheckpointError(f"{source}: {missing[0]} is missing, which {INDEX} names")
    return [source / name for name in sorted(names)]


def _copy_others(source: Path, folder: Path) -> None:
    """What is beside the weights, folders too; not other spellings of the weights, nor what is hidden."""
    for path in source.iterdir():
        if path.name.startswith(".") or path.name.endswith((".safetensors", ".index.json")):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif not (path.name.startswith("pytorch_model") and path.suffix == ".bin"):
            shutil.copyfile(path, folder / path.name)


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, from the file's header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        key: one["data_offsets"][1] - one["data_offsets"][0] for key, one in header.items() if key != "__metadata__"
    }


def _load(
    path: str, *, is_clip: bool, dtype: torch.dtype | None, device: torch.device, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The model and what is saved beside it: tokenizer or image processor."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {"dtype": dtype or "auto", **trust}
    try:
        if not is_clip:
            return (
                AutoModelForCausalLM.from_pretrained(path, **options).to(device).eval(),
                AutoTokenizer.from_pretrained(path, **trust),
            )
        config = AutoConfig.from_pretrained(path, **trust)
        config = getattr(config, "vision_config", config)
        model = AutoModel.from_pretrained(path, config=config, **options)
        return model.to(device).eval(), AutoImageProcessor.from_pretrained(path, backend="pil", **trust)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ModelError(
                f"{path}: the model is code of its own, which would run here; give --trust-remote-code if you trust it"
            ) from error
        raise ModelError(f"{path}: cannot load: {_line(error)}") from error


def _texts(tokenizer: Any, model: Any, asked: Probes) -> tuple[Asked, dict[str, str]]:
    """Each text as the tokenizer's chat template writes it, or plainly where it has none; why others are left out."""
    from jinja2 import TemplateError

    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    inputs, left_out = Asked(), {}
    for name, conversation in asked:
        try:
            if tokenizer.chat_template:
                options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
                ids = tokenizer.apply_chat_template(as_messages(conversation), **options)["input_ids"]
            else:
                text = "\n".join(message.text for message in conversation.messages)
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
        except TemplateError as error:
            left_out[name] = f"the chat template has no form for it: {_line(error)}"
            continue
        if room is not None and ids.shape[1] > room:
            left_out[name] = f"it takes {ids.shape[1]} tokens, and the model has positions for {room}"
            continue
        inputs[name] = {"input_ids": ids.to(model.device)}
    if not inputs:
        raise ModelError(f"no text could be asked, so nothing would be proved: {next(iter(left_out.values()))}")
    return inputs, left_out


def _pictures(processor: Any, model: Any, asked: Probes) -> tuple[Asked, dict[str, str]]:
    """The pictures of each probe that has some, several in one batch."""
    from PIL import Image

    inputs = Asked()
    for name, conversation in asked:
        if pictures := [Image.open(image.source).convert("RGB") for image in conversation.images]:
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            inputs[name] = {"pixel_values": pixels.to(model.device, model.dtype)}
    return inputs, {}


@torch.no_grad()
def _outputs(model: Any, asked: Asked) -> dict[str, Tensor]:
    """float32[rows, V]: the logits at the last positions of a text, or an encoder's last hidden state."""
    found = {}
    for name, inputs in asked.items():
        result: Tensor = model(**inputs)[0]
        rows = result.flatten(0, 1)
        found[name] = (rows[-POSITIONS:] if "input_ids" in inputs else rows).float().cpu()
    return found


def _compare(
    before: dict[str, Tensor], after: dict[str, Tensor], dtype: torch.dtype, left_out: dict[str, str]
) -> Report:
    outcomes, refusal, tolerance = [], "", tolerance_for(dtype, "none")
    for name, ours in before.items():
        difference, size = (after[name] - ours).abs(), float((ours - ours.mean(1, keepdim=True)).square().mean().sqrt())
        relative = float(difference.square().mean().sqrt()) / max(size, 1e-12)
        same = bool((ours.argmax(1) == after[name].argmax(1)).all())
        outcomes.append(Outcome(name, True, 0.0, float(difference.max()), relative, 0, same, ""))
        if not relative <= tolerance and not refusal:  # not `>`: a NaN is no parity either
            refusal = f"{name}: the outputs differ by {relative:.2g} of their size; {tolerance:g} is allowed"
    return Report(not refusal, str(dtype).removeprefix("torch."), tolerance, tuple(outcomes), refusal, left_out)

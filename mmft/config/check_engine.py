"""DeepSpeed's configs by name, and what can be known to be wrong with an engine before it starts."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmft.config.schema import TrainConfig
from mmft.errors import ConfigError, MmftError, Problem, did_you_mean
from mmft.plugins import Plugins

WHERE = "runtime.deepspeed"
HEADS = ("num_attention_heads", "num_key_value_heads")  # of queries, and of keys and values
OURS = {  # DeepSpeed's key -> the field that decides it
    "train_micro_batch_size_per_gpu": "optim.batch_size_per_device",
    "gradient_accumulation_steps": "optim.accumulate",
    "train_batch_size": "optim.batch_size_per_device, optim.accumulate and the number of processes",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16.enabled": "runtime.precision",
    "fp16.enabled": "runtime.precision",
}


def deepspeed_files(plugins: Plugins) -> dict[str, Path]:
    """The DeepSpeed configs that plugins ship, by name: `deepspeed/*.json` in their config folders."""
    folders = [folder.path / "deepspeed" for _, folder in plugins.config_dirs()]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def read_deepspeed(name: str, plugins: Plugins) -> dict[str, Any]:
    """The DeepSpeed config behind a name (XTuner's `deepspeed_zero2` too) or a path.

    Raises `ConfigError` where there is none, or the file is no JSON object.
    """
    known = deepspeed_files(plugins)
    short = name.removeprefix("deepspeed_")
    path = known.get(short, Path(name).expanduser())
    if short not in known and not path.is_file():
        hint = did_you_mean(short, known)
        listed = ", ".join(sorted(known))
        raise ConfigError([Problem(WHERE, f"no DeepSpeed config or file {name!r}{hint}", f"there are: {listed}")])
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(WHERE, f"{path} is no JSON: {error}")]) from error
    if not isinstance(content, dict):
        raise ConfigError([Problem(WHERE, f"{path} holds no object", "see DeepSpeed's configuration page")])
    return content


def engine_problems(config: TrainConfig, plugins: Plugins) -> Iterator[Problem]:
    """Engines that exclude each other, that are not installed, or that cannot hold this model."""
    runtime, llm = config.runtime, config.model.llm
    if runtime.deepspeed and runtime.fsdp:
        yield Problem("runtime.fsdp", "DeepSpeed and FSDP exclude each other", f"drop it, or {WHERE}")
    if runtime.deepspeed:
        yield from _deepspeed_problems(config, plugins)
    if runtime.sequence_parallel > 1:
        yield from _sequence_problems(config, plugins)
    if runtime.fsdp:
        if llm.quantization != "none":
            hint = "train in several processes without it (each holds the whole quantised model), or with zero2"
            yield Problem("runtime.fsdp", f"weights in {llm.quantization} cannot be sharded", hint)
        if runtime.precision == "fp16":
            yield Problem("runtime.fsdp", "fp16 needs a loss scale, which FSDP2 has none of", "use bf16")
        if "bit" in config.optim.optimizer:
            yield Problem("runtime.fsdp", f"{config.optim.optimizer} cannot step on shards", "use adamw_torch")


def _deepspeed_problems(config: TrainConfig, plugins: Plugins) -> Iterator[Problem]:
    assert config.runtime.deepspeed is not None
    if importlib.util.find_spec("deepspeed") is None:
        yield Problem(WHERE, "DeepSpeed is not installed", "pip install 'mmft[deepspeed]'")
    try:
        content = read_deepspeed(config.runtime.deepspeed, plugins)
    except ConfigError as error:
        yield from error.problems
        return
    except MmftError as error:
        yield Problem(WHERE, str(error))
        return
    for key in ("optimizer", "scheduler"):
        if key in content:
            yield Problem(WHERE, f"its section {key!r} would replace the learning rates of the parts", "remove it")
    for key, field in OURS.items():
        section, _, name = key.rpartition(".")
        holder = content.get(section, {}) if section else content
        value = holder.get(name, "auto") if isinstance(holder, dict) else "auto"
        if value not in ("auto", False):
            yield Problem(WHERE, f"{key} is {value!r} there, and {field} decides it", "write 'auto'")
    if config.runtime.precision == "fp16" and _computes_on_a_cpu(config):
        yield Problem("runtime.precision", "DeepSpeed has no fp16 on a CPU", f"use fp32 or bf16, or drop {WHERE}")
    quantization = config.model.llm.quantization
    if zero_stage(content) == 3 and quantization != "none":
        hint = "use zero2, where each process holds the whole quantised model"
        yield Problem(WHERE, f"ZeRO-3 cannot shard weights in {quantization}", hint)


def _sequence_problems(config: TrainConfig, plugins: Plugins) -> Iterator[Problem]:
    where, runtime = "runtime.sequence_parallel", config.runtime
    if importlib.util.find_spec("deepspeed") is None:
        yield Problem(where, "DeepSpeed is not installed", "pip install 'mmft[deepspeed]'")
    if config.data.streaming:
        yield Problem(where, "a stream deals out its rows to single processes", "drop data.streaming")
    if config.model.llm.attention not in ("auto", "varlen"):
        hint = "leave model.llm.attention at 'auto'"
        yield Problem(where, f"{config.model.llm.attention} cannot exchange heads", hint)
    try:
        stage = zero_stage(read_deepspeed(runtime.deepspeed, plugins)) if runtime.deepspeed else 0
    except MmftError:
        stage = 0  # told already
    heads = heads_of(config.model.llm.path)
    if any(number % runtime.sequence_parallel for number in heads):
        yield Problem(where, uneven_heads(runtime.sequence_parallel, heads).removeprefix(f"{where}: "))
    if runtime.fsdp or stage == 3:
        yield Problem(where, "rows and weights cannot both be shared out", "use zero2, or neither")


def heads_of(path: str) -> list[int]:
    """A language model's numbers of heads, where it is a folder or in the hub's cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file: Any = Path(path).expanduser() / "config.json"
    try:
        if not file.is_file():
            file = try_to_load_from_cache(path, "config.json")
        content = json.loads(Path(file).read_text("utf-8")) if isinstance(file, str | Path) else {}
    except (OSError, ValueError, HFValidationError):  # what is wrong with it is told where it is loaded
        return []
    for section in (content.get("text_config"), content) if isinstance(content, dict) else ():
        if isinstance(section, dict):
            return [section[name] for name in HEADS if isinstance(section.get(name), int)]
    return []


def uneven_heads(size: int, heads: Sequence[int]) -> str:
    """Why rows cannot be shared by `size` processes: of queries, keys and values each takes some heads."""
    listed = " and ".join(map(str, heads))
    return f"runtime.sequence_parallel: {size} must divide the heads of attention ({listed}); set it to a divisor, or 1"


def _computes_on_a_cpu(config: TrainConfig) -> bool:
    if config.runtime.device == "cpu":
        return True
    import torch  # takes seconds, and only this question needs it

    return not torch.cuda.is_available()


def zero_stage(content: dict[str, Any]) -> int:
    """0 to 3; 0 where the config has no ZeRO section."""
    section = content.get("zero_optimization")
    return int(section.get("stage", 0)) if isinstance(section, dict) else 0

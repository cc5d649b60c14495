"""Two real optimizer steps on the largest batch, in a process of its own, to hold an estimate against.

`python -m mmft.plan.probe CONFIG.json RESULT.json [PLUGIN ...]` is that process: on a CPU a peak is that of a whole
process, so nothing else may have run in it. Its baseline is what it takes when everything is imported.

On a CPU the allocator hides what tensors take. Left alone, glibc's malloc raises with each freed block the size from
which it hands blocks back (`M_MMAP_THRESHOLD` in mallopt(3)), to 32 MiB; smaller ones stay with the process. Measured
so, resident memory was up to twice what was alive; with the threshold held, both agree (docs/benchmarks.md).
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmft.config import TrainConfig
from mmft.config.load import dump_config
from mmft.errors import ModelError

HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's own first value; given, it stays; no other libc reads it


@dataclass(frozen=True)
class Measured:
    """Bytes beyond what Python and its libraries take, and the seconds of the second step."""

    peak: int  # of the two steps
    loading: int  # the most while the model was loaded; CPU only
    seconds: float  # of one optimizer step at the real accumulation
    tokens: int  # of one micro-batch
    device: str


def probe(config: TrainConfig, modules: tuple[str, ...] = (), *, hands_back: bool = True) -> Measured:
    """Measure in a fresh process; without `hands_back` with malloc as it is by default.

    Raises `ModelError` with the process' last line where it fails, out of memory included.
    """
    with TemporaryDirectory() as temporary:
        source, result = Path(temporary, "config.json"), Path(temporary, "measured.json")
        source.write_text(dump_config(config), "utf-8")
        command = [sys.executable, "-m", "mmft.plan.probe", str(source), str(result), *modules]
        environment = {**(HANDS_BACK if hands_back else {}), **os.environ}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode or not result.is_file():
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            if done.returncode == -9:
                reason = "the system ended it, most likely for want of memory"
            raise ModelError(f"--probe: the two steps failed: {reason}")
        return Measured(**json.loads(result.read_text("utf-8")))


def measure(config: TrainConfig, plugins: Any) -> Measured:
    """Build, run two steps, read the counters; only in a process that did nothing before."""
    import peft  # noqa: F401  # imported, so that the baseline has it
    import torch
    from transformers import Trainer

    from mmft.data.collate import Collator
    from mmft.data.shape import describe_model
    from mmft.modeling.build import build_model
    from mmft.modeling.llm import device_and_dtype
    from mmft.plan.memory import resident_bytes
    from mmft.plan.steps import read_data
    from mmft.train.trainer import parameter_groups, training_arguments

    if config.model.llm.quantization != "none" or "8bit" in config.optim.optimizer:
        import bitsandbytes  # noqa: F401
    shape = describe_model(config.model, plugins)
    data = read_data(config, plugins, shape, whole=True)
    device, dtype = device_and_dtype(config.runtime)
    arguments = training_arguments(config, dtype=dtype, device=device)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    _warm_up(torch, device, dtype, kind, options)
    baseline = resident_bytes()
    built = build_model(
        config.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=dtype, device=device,
        gradient_checkpointing=config.runtime.gradient_checkpointing,
    ).train()  # fmt: skip
    loading = resident_bytes("VmHWM") - baseline
    optimizer = kind(parameter_groups(built, config.optim), **options)
    transform = shape.vision.transform if shape.vision else None
    collate = Collator(built.layout, shape.tokenizer.hf.pad_token_id or 0, transform)
    items = data.largest(config.optim.batch_size_per_device)[0]
    batch: dict[str, Any] = dict(collate([data.dataset[int(item)] for item in items]))
    batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if config.model.vision and config.model.vision.feature_cache and "pixel_values" in batch and built.feature_shape:
        number = len(batch.pop("pixel_values"))
        batch["image_features"] = torch.zeros(number, *built.feature_shape, dtype=dtype, device=device)
    _reset_peak(torch, device)
    micro = min(2, config.optim.accumulate)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(micro):
            built(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_([p for p in built.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM") - baseline
    tokens = int(batch["input_ids"].numel())
    return Measured(peak, 0 if on_gpu else loading, seconds * config.optim.accumulate / micro, tokens, device.type)


def _warm_up(torch: Any, device: Any, dtype: Any, kind: Any, options: dict[str, Any]) -> None:
    """Train a model of next to nothing: what libraries load and set up at their first step is no part of ours.

    Without it some 150 MB of torch's code that only a step brings into memory counted as the model's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from mmft.modeling import attention
    from mmft.modeling.llava import LlavaModel

    attention.register()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).to(device)
    llm.set_attn_implementation(attention.VARLEN)
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = LlavaModel(llm, dtype=dtype).train()
    optimizer = kind(model.parameters(), **options)
    ids = torch.ones(1, 256, dtype=torch.int64, device=device)
    for _ in range(2):
        model(ids, labels=ids, position_ids=torch.arange(256, device=device)[None])["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _reset_peak(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # Linux: VmHWM starts anew


def main() -> None:
    """The process that measures."""
    from mmft.config.load import load_config
    from mmft.plugins import load_plugins, named_module

    source, result, *modules = sys.argv[1:]
    plugins = load_plugins([named_module(name) for name in modules])
    measured = measure(load_config(source, plugins, ()), plugins)
    Path(result).write_text(json.dumps(asdict(measured)), "utf-8")


if __name__ == "__main__":
    main()

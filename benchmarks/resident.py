"""Whose memory grows over a CPU run: `python benchmarks/resident.py [--hidden 256] [--steps 1000]`.

Trains a Llama of random weights on generated conversations of very different lengths, through `mmft.train` itself, and
prints at doubling steps: resident memory, what malloc has handed out (its arenas and its mappings), what it keeps of
freed blocks, the bytes of all live tensors and the number of Python objects. At the end it asks malloc to give back
what it keeps. What is a leak of ours grows in the third or a later column; what malloc keeps grows in "kept" alone.
"""

import ctypes
import gc
import json
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import click
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from mmft import hookimpl
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use
from mmft.plan.memory import resident_bytes
from mmft.plugins import load_plugins
from mmft.testing import tiny_tokenizer
from mmft.train.run import train

WORDS = ("the", "cat", "sees", "a", "dog", "under", "an", "old", "tree", "and", "says", "nothing", "while", "it rains")


class Mallinfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns, over all arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def malloc_holds() -> tuple[int, int]:
    """Bytes that glibc's malloc has handed out, and bytes it keeps of what was freed; (0, 0) under another malloc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0, 0
    libc.mallinfo2.restype = Mallinfo
    told = libc.mallinfo2()
    return told.uordblks + told.hblkhd, told.fordblks


def live_tensors() -> int:
    """Bytes behind every tensor that Python can reach; gradients and optimizer state are among them."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would wake lazy modules
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Watch(TrainerCallback):  # type: ignore[misc]
    """A line at steps 1, 2, 4, 8 and so on, and at every tenth part of the run."""

    def __init__(self) -> None:
        self.first = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is time to."""
        step = state.global_step
        if step & (step - 1) == 0 or step % max(1, state.max_steps // 10) == 0:
            self.tell(str(step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once more after malloc was asked to hand back what it keeps."""
        gc.collect()
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
            self.tell("trimmed")

    def tell(self, when: str) -> None:
        """Print the line."""
        handed, kept = malloc_holds()
        bytes_ = (resident_bytes(), handed, kept, live_tensors())
        told = "".join(f"{number / 1e6:10.1f}" for number in bytes_)
        print(f"{when:>8}{told}{len(gc.get_objects()):10,}", flush=True)


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """A Llama of random weights with a small tokenizer."""
    tiny_tokenizer(folder)
    words = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_records(path: Path, number: int) -> None:
    """Conversations of 10 to some hundred words, most of them short."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            answer = " ".join(chance.choices(WORDS, k=min(250, max(3, int(chance.lognormvariate(3.5, 1.0))))))
            record = {"conversations": [{"from": "human", "value": "Go on."}, {"from": "gpt", "value": answer}]}
            file.write(json.dumps(record) + "\n")


def watched() -> Any:
    """The installed plugins and one more, which brings the callback."""
    module = ModuleType("watch")

    def mmft_callbacks(config: TrainConfig) -> Iterable[Any]:
        return [Watch()]

    module.mmft_callbacks = hookimpl(mmft_callbacks)  # type: ignore[attr-defined]
    return load_plugins([module])


@click.command()
@click.option("--hidden", default=64)
@click.option("--layers", default=2)
@click.option("--steps", default=1000)
@click.option("--batch", default=4)
@click.option("--length", default=1024, help="the longest sample, and the packed row")
@click.option("--packing", is_flag=True)
@click.option("--lora", is_flag=True)
@click.option("--precision", default="fp32")
def main(
    hidden: int, layers: int, steps: int, batch: int, length: int, packing: bool, lora: bool, precision: str
) -> None:
    """Train and tell what the process holds, in MB."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "llm", hidden, layers)
        write_records(folder / "data.jsonl", 4000)
        source = use("jsonl", path=str(folder / "data.jsonl"))
        adapter, saving = Lora(r=16) if lora else None, max(1, steps // 4)
        config = TrainConfig(
            model=Model(llm=LLM(path=str(folder / "llm"), trainable=not lora, lora=adapter)),
            data=Data(
                datasets=(Dataset(source=source, data_map="llava"),), chat_template="chatml", max_length=length,
                packing=packing,
            ),
            optim=Optim(lr=1e-3, max_steps=steps, batch_size_per_device=batch),
            runtime=Runtime(output_dir=folder / "run", device="cpu", precision=precision, save_steps=saving),
        )  # fmt: skip
        logging.getLogger("mmft").setLevel(logging.WARNING)
        print(f"{'step':>8}{'resident':>10}{'handed':>10}{'kept':>10}{'tensors':>10}{'objects':>10}", flush=True)
        train(config, watched())


if __name__ == "__main__":
    main()

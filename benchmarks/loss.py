"""What the pieces of the loss cost and save: `python benchmarks/loss.py [--words 49152] [--tokens 2048]`.

One Llama of random weights, forward and backward over tokens that are all trained, with all logits at once and in
pieces, with a trained and with a frozen language model (whose embeddings then get the gradient, as pictures do). Each
in a process of its own: seconds of CPU time a step, and the peak of resident memory over what was there before.
"""

import subprocess
import sys
import time
from dataclasses import dataclass

import click
import torch

from mmft.modeling import attention
from mmft.modeling.llava import LlavaModel
from mmft.modeling.loss import piece_size
from mmft.plan.memory import resident_bytes


@dataclass
class Shape:
    """Sizes of the model and of its row."""

    hidden: int
    layers: int
    words: int
    tokens: int


def measure(shape: Shape, how: str, trained: str, steps: int = 3) -> None:
    """Print CPU seconds of a step and the peak, in MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register()
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.words, hidden_size=shape.hidden, intermediate_size=shape.hidden * 8 // 3,
            num_hidden_layers=shape.layers, num_attention_heads=shape.hidden // 64, tie_word_embeddings=True,
        )
    )  # fmt: skip
    size = piece_size(llm) if how == "pieces" else None
    attention.choose(llm, "auto")
    llm.requires_grad_(trained == "full")
    if trained == "frozen":
        llm.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    model = LlavaModel(llm).train()
    model.loss_piece = size
    ids = torch.randint(0, shape.words, (1, shape.tokens))
    places = torch.arange(shape.tokens)[None]
    before, times = resident_bytes(), []
    for _ in range(steps):
        began = time.process_time()
        model(input_ids=ids, labels=ids.clone(), position_ids=places)["loss"].backward()
        times.append(time.process_time() - began)
        model.zero_grad()
    peak = resident_bytes("VmHWM") - before
    print(f"{trained:7} {how:7} {min(times):7.2f} CPU s a step   peak {peak / 1e6:7.0f} MB", flush=True)


@click.command()
@click.option("--hidden", default=576)
@click.option("--layers", default=30)
@click.option("--words", default=49152)
@click.option("--tokens", default=2048)
@click.option("--only", nargs=2, default=None, hidden=True)
def main(hidden: int, layers: int, words: int, tokens: int, only: tuple[str, str] | None) -> None:
    """Compare all logits at once with pieces."""
    if only:
        measure(Shape(hidden, layers, words, tokens), *only)
        return
    for trained in ("full", "frozen"):
        for how in ("whole", "pieces"):
            subprocess.run([sys.executable, *sys.argv, "--only", how, trained], check=True)


if __name__ == "__main__":
    main()

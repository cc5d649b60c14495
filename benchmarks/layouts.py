"""What a training step costs by the way its samples are laid out: ratios within one run, each contender in turn.

    python benchmarks/layouts.py work_dirs/demo/llm          (any local causal model; `make demo` makes that one)

padded        one sample a row, padded to the longest, logits at every position: a plain loop
padded, kept  the same, logits at the positions that have a label somewhere in the batch
flat          one row of all samples, attention inside each, logits at labels only: what mmft trains with
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F

from mmft.data.collate import flat_batch, padded_batch
from mmft.modeling import attention
from mmft.modeling.llava import LlavaModel
from mmft.types import IGNORE_INDEX, TokenizedSample

ROUNDS, SAMPLES = 5, 8


def samples(vocabulary: int) -> list[TokenizedSample]:
    """Conversation-like lengths (31 to 512 tokens), the second half of each trained."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.3, 0.6, SAMPLES), 31, 512).astype(int)
    return [TokenizedSample(random.integers(3, vocabulary, n).astype(np.int32), np.arange(n) > n // 2) for n in lengths]


def main(path: str) -> None:
    """Time the contenders in turn, and print tokens a second and the ratio to the plain loop."""
    from transformers import AutoModelForCausalLM

    attention.register()
    llm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = LlavaModel(llm, dtype=torch.bfloat16).train()
    items = samples(llm.config.vocab_size)
    padded, flat = padded_batch(items, 0), flat_batch(items)
    tokens = sum(map(len, items))

    def plain() -> torch.Tensor:
        logits = llm(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), padded["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )

    contenders: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {
        "padded": ("sdpa", plain),
        "padded, kept": ("sdpa", lambda: model(**padded)["loss"]),
        "flat": (attention.VARLEN, lambda: model(**flat)["loss"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS + 1):
        for name, (implementation, loss) in contenders.items():
            llm.set_attn_implementation(implementation)
            seconds[name].append(timed(loss, llm.parameters()))
    floor = statistics.median(seconds["padded"][1:])
    print(f"{SAMPLES} samples, {tokens} tokens, {padded['input_ids'].numel()} positions padded; medians of {ROUNDS}")
    for name, times in seconds.items():
        median = statistics.median(times[1:])  # the first round warms up
        print(f"{name:14}{tokens / median:8.0f} tokens/s   x{floor / median:.2f}")


def timed(loss: Callable[[], torch.Tensor], parameters: Iterable[torch.nn.Parameter]) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    torch.autograd.backward(loss())
    elapsed = time.perf_counter() - began
    for parameter in parameters:
        parameter.grad = None
    return elapsed


if __name__ == "__main__":
    main(sys.argv[1])

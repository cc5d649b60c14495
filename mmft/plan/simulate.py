"""One training step on a model that holds nothing, counting every byte that is alive at every moment.

The step is the real one: our forward, torch's autograd, the optimizer's own class. So what torch keeps for the backward
pass, the float32 copy of the logits, a recomputed block or an optimizer's temporary need no formula.
"""

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmft.config import TrainConfig
from mmft.modeling.attention import VARLEN
from mmft.plan.skeleton import Skeleton, Target
from mmft.types import IGNORE_INDEX

DOCUMENTS = 4  # samples of a row that are simulated apart: each more takes time and changes no byte


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors made since it began and not freed, now (`live`) and at most (`peak`); real or fake ones.

    What exists already (`known`: weights, gradients, optimizer states) is not counted.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._held = [tensor.untyped_storage() for tensor in known]  # held, or another storage could get its id
        self._seen: dict[int, Any] = {id(storage): None for storage in self._held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            if self._seen.pop(key, None) is not None:
                self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size


@dataclass(frozen=True)
class BatchShape:
    """All that memory depends on: the samples' lengths in the flat row, its targets, its pictures."""

    lengths: tuple[int, ...]
    num_labels: int
    num_images: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return sum(self.lengths)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one optimizer step beside the frozen weights."""

    gradients: int
    optimizer: int
    saved: int  # kept for the backward pass when the forward pass is done
    working: int  # the most that forward and backward need beside weights, whole gradients and optimizer states
    update: int  # the most that the optimizer needs beside them


def simulate(
    skeleton: Skeleton, config: TrainConfig, batches: Sequence[BatchShape], tokens_per_image: int, target: Target,
    *, shards_gradients: bool = False,
) -> StepBytes:  # fmt: skip
    """The worst of some batches. Under accumulation the gradients of earlier batches are there all the time.

    Gradients that are shared out lie where they will stay, as accumulated ones do: `working` then holds none of them.
    """
    model = skeleton.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(_bytes(p) for p in trained)
    saved = working = 0
    accumulates = config.optim.accumulate > 1 or shards_gradients
    for batch in batches:
        _set_gradients(skeleton, trained if accumulates else [])
        inputs = batch_inputs(skeleton, config, batch, tokens_per_image)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
        with LiveBytes(known) as counted:
            loss = model(**inputs)["loss"]
            saved = max(saved, counted.live)
            loss.backward()
        del loss, inputs
        held = gradients if accumulates else 0
        working = max(working, counted.peak + held - gradients)
        for parameter in model.parameters():
            parameter.grad = None
    masters = [_master(skeleton, p) for p in trained]
    _set_gradients(skeleton, masters)
    optimizer, update = _optimizer_bytes(skeleton, config, masters, target)
    for parameter in masters:
        parameter.grad = None
    return StepBytes(gradients, optimizer, saved, max(0, working), update)


def batch_inputs(skeleton: Skeleton, config: TrainConfig, batch: BatchShape, tokens_per_image: int) -> dict[str, Any]:
    """The keyword arguments of a forward pass: real ids and labels, pictures that hold nothing."""
    model, total = skeleton.model, batch.num_tokens
    ids = torch.zeros(1, total, dtype=torch.int64)
    labels = torch.full((1, total), IGNORE_INDEX)
    labels[0, total - min(batch.num_labels, total - 1) :] = 0
    highest = max(batch.lengths) - 1  # where rope is stretched by the length, no sample is longer than it is
    documents = _documents(model.llm.config, batch.lengths)
    positions = torch.cat([torch.arange(length).clamp(max=highest) for length in documents])[None]
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if batch.num_images and model.image_id is not None and model.feature_shape is not None:
        ids[0, : batch.num_images * tokens_per_image] = model.image_id
        cached = model.vision is None or (config.model.vision is not None and config.model.vision.feature_cache)
        if cached or model.pixel_shape is None:
            shape, dtype = model.feature_shape, model.dtype
            inputs["image_features"] = skeleton.fake(batch.num_images, *shape, dtype=dtype)
        else:
            inputs["pixel_values"] = skeleton.fake(batch.num_images, *model.pixel_shape)
    return inputs


def _documents(config: Any, lengths: Sequence[int]) -> Sequence[int]:
    """The samples of a row, joined to a few where attention keeps nothing that grows faster than their tokens.

    Its scores exist whole where a window needs a mask and where they are dropped out.
    """
    total = sum(lengths)
    joined = [total // DOCUMENTS + (index < total % DOCUMENTS) for index in range(DOCUMENTS)]
    window = getattr(config, "sliding_window", None) or total
    apart = config._attn_implementation != VARLEN or getattr(config, "attention_dropout", 0)
    return lengths if len(lengths) <= DOCUMENTS or apart or joined[0] > window else joined


def _set_gradients(skeleton: Skeleton, trained: Sequence[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = skeleton.fake(*parameter.shape, dtype=parameter.dtype)


def _master(skeleton: Skeleton, parameter: nn.Parameter) -> nn.Parameter:
    """What the optimizer steps on: the weight itself, or its float32 copy where an engine keeps it in 16 bits."""
    return parameter if parameter.dtype is torch.float32 else nn.Parameter(skeleton.fake(*parameter.shape))


def _optimizer_bytes(
    skeleton: Skeleton, config: TrainConfig, trained: list[nn.Parameter], target: Target
) -> tuple[int, int]:
    """(bytes of its states, the most an update needs beside them) of the optimizer the config names."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(config.runtime.output_dir), optim=config.optim.optimizer, use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    if target == "cuda" and "foreach" in torch.optim.AdamW.__init__.__code__.co_varnames and kind is torch.optim.AdamW:
        options = {**options, **({} if options.get("fused") else {"foreach": True})}  # what torch takes on CUDA
    optimizer = kind(trained, **options)
    if hasattr(optimizer, "init_state"):  # bitsandbytes: its kernels take no fake tensors, its states do
        return _eight_bit_states(optimizer), 0
    with LiveBytes([*trained, *(p.grad for p in trained if p.grad is not None)]) as counted:
        optimizer.step()
    states = sum(_bytes(value) for state in optimizer.state.values() for value in tree_leaves(state) if _is(value))
    return states, max(0, counted.peak - states)


def _eight_bit_states(optimizer: Any) -> int:
    total = 0
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # nothing is paged here
    optimizer.check_overrides()
    optimizer.to_gpu()
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, index)
            state = optimizer.state[parameter]
            total += sum(_bytes(value) for key, value in state.items() if _is(value) and not key.startswith("qmap"))
    return total + 2 * 256 * 4  # the two tables all parameters share


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""Cross entropy of the trained tokens, in pieces where all their logits together would be large.

A language model's last layer makes a number for each word of its vocabulary: with 152,000 words, 8,000 trained tokens
have 4.9 GB of logits in float32, and as much again for their gradient.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmft.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

LOGITS = 1 << 25  # computed at once: 128 MiB in float32; benchmarks/loss.py


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [B, K, V], targets int64[B, K] -> float32[B, K], 0 where nothing is trained."""
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view(targets.shape)


def token_losses_in_pieces(causal_lm: Any, hidden: Tensor, targets: Tensor, size: int) -> Tensor:
    """As `token_losses`, from the last hidden states [B, K, D]; logits exist for `size` tokens at a time.

    Where the last layer is frozen (LoRA), each piece has its gradient while its logits are there. Where it is trained,
    logits are made once more for the backward pass, so that engines find the layer's gradient where they expect it.
    """

    def losses(states: Tensor, words: Tensor) -> Tensor:
        return token_losses(logits_of(causal_lm, states[None]), words[None])[0]

    trained = any(parameter.requires_grad for parameter in causal_lm.get_output_embeddings().parameters())
    pieces = zip(torch.split(hidden.flatten(0, 1), size), torch.split(targets.flatten(), size), strict=True)
    done = [
        checkpoint(losses, states, words, use_reentrant=False, preserve_rng_state=False)
        if trained
        else _LossWithGradient.apply(losses, states, words)  # type: ignore[no-untyped-call]
        for states, words in pieces
    ]
    return torch.cat(done).view(targets.shape)


class _LossWithGradient(torch.autograd.Function):
    """Losses float32[K] of states [K, D]: each has a gradient in its own state alone, which is computed with it."""

    @staticmethod
    def forward(ctx: Any, losses: Callable[[Tensor, Tensor], Tensor], states: Tensor, words: Tensor) -> Tensor:
        """The losses; their gradient is kept, as large as the states."""
        if not ctx.needs_input_grad[1]:
            return losses(states, words)
        with torch.enable_grad():
            own = states.detach().requires_grad_()
            found = losses(own, words)
            (gradient,) = torch.autograd.grad(found.sum(), own)
        ctx.save_for_backward(gradient)
        return found.detach()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[None, Tensor, None]:
        """Weighted as the losses are."""
        (gradient,) = ctx.saved_tensors
        return None, gradient * weights[0][:, None].to(gradient.dtype), None


def logits_of(causal_lm: Any, hidden: Tensor) -> Tensor:
    """Last hidden states [B, K, D] -> logits [B, K, V], as transformers' models make them.

    Beside the last layer some families have one number in their configuration: Granite divides by `logits_scaling`,
    Cohere multiplies by `logit_scale`, Gemma 2 bounds by `final_logit_softcapping`.
    """
    logits: Tensor = causal_lm.get_output_embeddings()(hidden)
    divisor, factor, bound = (
        getattr(causal_lm.config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
    )
    if divisor is not None:
        logits = logits / divisor
    if factor is not None:
        logits = logits * factor
    if bound is not None:
        logits = bound * torch.tanh(logits / bound)
    return logits


@torch.no_grad()
def piece_size(causal_lm: Any) -> int | None:
    """For how many tokens logits are computed at once; None (for all) where `logits_of` is not what the model does.

    To be asked before an attention is set that wants to know the limits of samples.
    """
    embeddings = causal_lm.get_input_embeddings()
    ids = torch.arange(4, device=embeddings.weight.device)[None] % embeddings.num_embeddings
    inputs = {"inputs_embeds": embeddings(ids), "use_cache": False}
    try:
        expected = causal_lm(**inputs).logits.float()
        found = logits_of(causal_lm, causal_lm.base_model(**inputs).last_hidden_state).float()
    except Exception as error:  # a model of somebody's own code may refuse in any way; it is then computed whole
        logger.info("loss: logits of all trained tokens are computed at once (%s: %s)", type(error).__name__, error)
        return None
    if found.shape != expected.shape or (found - expected).abs().max() > 0.01 * expected.std():
        logger.info("loss: logits of all trained tokens are computed at once, because this model scales them")
        return None
    return tokens_at_once(expected.shape[-1])


def tokens_at_once(num_words: int) -> int:
    """How many tokens have `LOGITS` logits together, of a vocabulary of so many words."""
    return max(1, LOGITS // num_words)


def token_mean(losses: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """The sum of all losses divided by how many trained tokens the whole step has, or these where that is None."""
    count = num_items if num_items is not None else (targets != IGNORE_INDEX).sum().clamp(min=1)
    return losses.sum() / (count.to(losses.device) if isinstance(count, Tensor) else count)


def dataset_sums(losses: Tensor, targets: Tensor, dataset_ids: Tensor, num_datasets: int) -> Tensor:
    """float32[2, D], without gradient: summed losses and number of trained tokens of each dataset."""
    sums = losses.new_zeros(2, num_datasets)
    places = dataset_ids.flatten()
    sums[0].index_add_(0, places, losses.detach().flatten())
    sums[1].index_add_(0, places, (targets != IGNORE_INDEX).flatten().to(sums.dtype))
    return sums

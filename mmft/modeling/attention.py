"""Attention that stays inside each sample of a row, and the self-test that proves it before training.

Samples of a flat batch share one row. Their limits travel to every layer as `cu_seq_lens_q`, transformers' own keyword
for it. `varlen` is registered through transformers' public attention interface: SDPA sample by sample, or torch's
variable-length kernel on CUDA, so 16 samples of 128 tokens cost 16 x 128², not 2048². flash-attn, where it is
installed, takes the same keywords.
"""

import importlib.util
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.errors import ModelError

log = logging.getLogger("mmft")
VARLEN = "mmft_varlen"
SELF_TEST_LENGTH = 6


def register() -> None:
    """Make `attn_implementation="mmft_varlen"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No dense mask is built: the limits are in `cu_seq_lens_q`."""


def document_limits(position_ids: Tensor) -> dict[str, Any]:
    """transformers' keywords for the samples of a row: int64[1, T] positions that restart at 0 -> cu_seq_lens int32."""
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    limits = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(torch.int32)
    longest = int(limits.diff().max())
    return {"cu_seq_lens_q": limits, "cu_seq_lens_k": limits, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample: query float[1, H, T, Dh], key and value float[1, Hkv, T, Dh].

    Returns float[1, T, H, Dh]. Raises `ModelError` for what it cannot do (soft-capped scores, attention sinks), which
    the self-test turns into another implementation.
    """
    stretch = kwargs.pop("stretch", None)
    if stretch is not None:  # the row is shared by several processes

        def whole_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            row = (None, scaling, dropout, sliding_window, cu_seq_lens_q, max_length_q)
            return varlen_attention(module, q, k, v, *row, **kwargs)[0]

        return stretch.attend(whole_row, query, key, value), None
    unsupported = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unsupported or query.shape[0] != 1 or cu_seq_lens_q is None:
        raise ModelError(f"per-sample attention: not possible here ({', '.join(unsupported) or 'no sample limits'})")
    if query.is_cuda and query.dtype is not torch.float32 and _cuda_kernel_available():
        return _cuda_varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool[T, T] of a sliding window, or None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) & (distance < window)


@cache
def _cuda_kernel_available() -> bool:
    """torch.nn.attention.varlen with sliding windows, which say "causal" there, and grouped heads (torch >= 2.12)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def _cuda_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    limits: Tensor,
    longest: int | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """torch's variable-length kernel, which has no CPU version: float[1, T, H, Dh]."""
    from torch.nn.attention.varlen import varlen_attn

    longest = longest or int(limits.diff().max())
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    left = -1 if window is None else window - 1
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        q,
        k,
        v,
        limits,
        limits,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None]


def choose(llm: Any, requested: str) -> str:
    """Set the attention implementation and return the layout it allows: `flat` or `padded`.

    `auto` takes flash-attn where it is installed and a GPU is there, else `varlen`, else the model's own, each only if
    it keeps samples apart in a self-test. Raises `ModelError` where a requested one does not.
    """
    on_gpu = next(llm.parameters()).is_cuda
    own: str = llm.config._attn_implementation
    flash = ["flash_attention_2"] if on_gpu and importlib.util.find_spec("flash_attn") else []
    candidates = {"auto": [*flash, VARLEN, own], "varlen": [VARLEN]}.get(requested, [requested])
    reasons: list[str] = []
    for name in candidates:
        reason = _try(llm, name)
        if not reason:
            for other in reasons:
                log.info("attention %s; using %s", other, name)
            return "flat"
        reasons.append(f"{name}: {reason}")
    if requested not in ("auto", own):
        raise ModelError(f"model.llm.attention: {'; '.join(reasons)}; leave it at 'auto'")
    llm.set_attn_implementation(own)
    log.warning("attention: samples are padded, which is slower, because %s", "; ".join(reasons))
    return "padded"


def _try(llm: Any, name: str) -> str:
    """Set an implementation and test it; returns why it does not do, or an empty string."""
    try:
        llm.set_attn_implementation(name)
        leak = isolation_error(llm)
    except Exception as error:  # any failure of a candidate means: take the next one
        return f"{type(error).__name__}: {error}"
    return leak


@torch.no_grad()
def isolation_error(llm: Any) -> str:
    """Why samples that share a row are not computed as if alone; an empty string where they are.

    Two samples of a few random tokens are run together, with the first changed, and the second alone. Tolerances are
    for half precision: an honest implementation differs by rounding, a leaking one by more than a tenth of the logits'
    scale (3.5 was measured on a small Llama with an all-ones mask).
    """
    embeddings = llm.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    n = SELF_TEST_LENGTH
    ids = torch.randint(0, embeddings.num_embeddings, (3, n), generator=generator).to(embeddings.weight.device)
    alone = _logits(llm, ids[1:2], n)
    together = _logits(llm, torch.cat([ids[0], ids[1]])[None], n)
    changed = _logits(llm, torch.cat([ids[2], ids[1]])[None], n)
    scale = float(alone.float().std())
    leak = float((together[:, n:] - changed[:, n:]).abs().max())
    difference = float((together[:, n:] - alone).abs().max())
    if leak > 0.02 * scale:
        return f"samples that share a row see each other (logits move by {leak:.3g}, their scale is {scale:.3g})"
    if difference > 0.2 * scale:
        return f"a sample in a row differs from the same sample alone by {difference:.3g} (scale {scale:.3g})"
    return ""


def _logits(llm: Any, ids: Tensor, length: int) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)[None] % length
    logits: Tensor = llm(
        inputs_embeds=llm.get_input_embeddings()(ids),
        position_ids=positions,
        use_cache=False,
        **document_limits(positions),
    ).logits
    return logits.float()


@contextmanager
def for_generation(llm: Any) -> Iterator[None]:
    """Use SDPA while generating: with a cache a step has one query token, which `varlen` is not made for."""
    before = llm.config._attn_implementation
    if before != VARLEN:
        yield
        return
    llm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        llm.set_attn_implementation(before)

"""The language model of a GGUF file: llama.cpp's keys from a transformers config, its tensors from the weights.

llama.cpp has one graph for each architecture, fixed in its C++ (src/models/*.cpp of llama.cpp 0.5, which
llama-cpp-python 0.3.36 brings). What a config may say beyond that graph is refused here, by name.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmft.convert.gguf.file import Piece, as_floats
from mmft.errors import ModelError

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu", "gelu_new")


@dataclass(frozen=True)
class Family:
    """How a model type of transformers becomes an architecture of llama.cpp.

    `pairs`: q and k are rotated in neighbouring pairs there, in halves in transformers, so their rows change places.
    `plus_one`: norms multiply by 1 + weight in transformers. `rope_tensor`: takes frequencies as a tensor of factors.
    `window`: knows a sliding window; others are exact up to its length, which becomes their context.
    `tied`: takes no output head of its own. `scaled`: multiplies what a picture gives by the root of the width too, as
    it does the embeddings of words, and transformers does not. `pattern`: every such layer is not windowed (gemma), or
    not rotated.
    """

    arch: str
    activation: tuple[str, ...] = SILU
    pairs: bool = False
    plus_one: bool = False
    rope_tensor: bool = False
    window: bool = False
    tied: bool = False
    scaled: bool = False
    pattern: int = 0
    more: Callable[[Any, Any], None] | None = None


def _gemma2(writer: Any, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)


def _gemma3(writer: Any, config: Any) -> None:
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    local = (config.rope_parameters or {}).get("sliding_attention") or {}
    if "rope_theta" in local:
        writer.add_rope_freq_base_swa(local["rope_theta"])


FAMILIES = {
    "llama": Family("llama", pairs=True, rope_tensor=True),
    "mistral": Family("llama", pairs=True, rope_tensor=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", activation=GELU, plus_one=True, tied=True, scaled=True),
    "gemma2": Family(
        "gemma2", activation=GELU, plus_one=True, tied=True, scaled=True, window=True, pattern=2, more=_gemma2
    ),
    "gemma3_text": Family("gemma3", activation=GELU, plus_one=True, window=True, pattern=6, more=_gemma3),
    "smollm3": Family("smollm3", pairs=True, pattern=4),
}


def find_family(config: Any) -> Family:
    """The architecture of a config. Raises `ModelError` for one that has none here, naming those that have."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"GGUF: model type {config.model_type!r} is not among those written here ({', '.join(FAMILIES)}); "
            "use `mmft convert hf` and llama.cpp's convert_hf_to_gguf.py, or `mmft convert merge`"
        )
    return family


def text_file(config: Any, rows: int, *, name: str, file_type: str) -> Any:
    """A `gguf.GGUFWriter` with every key that describes the model; `rows` are those of its embedding.

    Raises `ModelError` for what llama.cpp's graph of this architecture does not compute.
    """
    import gguf

    family = find_family(config)
    _check(config, family)
    writer = gguf.GGUFWriter(None, family.arch)
    head = head_dim(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(_context(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _rope(writer, config, family)
    if family.arch == "phi3":
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    elif family.window:
        writer.add_sliding_window(config.sliding_window)
    if family.more:
        family.more(writer, config)
    return writer


def head_dim(config: Any) -> int:
    """Of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_parameters(config: Any) -> dict[str, Any]:
    found = dict(config.rope_parameters or {})
    return dict(found.get("full_attention", found))


def _check(config: Any, family: Family) -> None:
    """Raise `ModelError` for settings that the graph of this architecture ignores."""
    problems = []
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in family.activation:
        problems.append(f"activation {activation!r} (it computes {family.activation[0]})")
    if family.tied and not config.tie_word_embeddings:
        problems.append("an output head of its own (it uses the embeddings)")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != head_dim(config):
        problems.append(f"query_pre_attn_scalar={scalar} (it uses the head's width, {head_dim(config)})")
    if getattr(config, "use_bidirectional_attention", False):
        problems.append("attention in both directions")
    if family.window and config.layer_types != expected_layers(config, family):
        problems.append(f"another order of windowed layers (it has a full one every {family.pattern})")
    plain = getattr(config, "no_rope_layers", None)
    if plain is not None and list(plain) != [int((k + 1) % 4 != 0) for k in range(config.num_hidden_layers)]:
        problems.append("no_rope_layers (it leaves every fourth layer unrotated)")
    kind = _rope_parameters(config).get("rope_type", "default")
    known = {"default", "linear", "yarn"} | ({"llama3"} if family.rope_tensor else set())
    known |= {"longrope"} if family.arch == "phi3" else set()
    if kind not in known:
        problems.append(f"rope_type {kind!r} (it has {', '.join(sorted(known))})")
    if problems:
        raise ModelError(f"GGUF: llama.cpp's {family.arch!r} graph does not know {'; '.join(problems)}")


def expected_layers(config: Any, family: Family) -> list[str]:
    """The kinds of layers that llama.cpp assumes: every `pattern`-th sees everything."""
    kinds = ("full_attention", "sliding_attention")
    return [kinds[(k + 1) % family.pattern != 0] for k in range(config.num_hidden_layers)]


def _context(config: Any, family: Family) -> int:
    """Positions; where a sliding window is not known, those within it, which are the same without."""
    window = getattr(config, "sliding_window", None)
    used = window and not family.window and getattr(config, "use_sliding_window", True)
    return min(config.max_position_embeddings, window) if used else int(config.max_position_embeddings)


def _rope(writer: Any, config: Any, family: Family) -> None:
    import gguf

    rope = _rope_parameters(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(original or config.max_position_embeddings))
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(float(rope[key]))
    if family.arch == "phi3":
        original = int(original or config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        if kind == "longrope":
            scale = config.max_position_embeddings / original
            grown = float(np.sqrt(1 + np.log(scale) / np.log(original))) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or grown))


def text_pieces(llm: Any) -> list[Piece]:
    """Every tensor of a causal language model under llama.cpp's names.

    Raises `ModelError` for a weight that has no name there: a model of this type with something added.
    """
    import gguf

    config = llm.config
    family = find_family(config)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    pieces = list(_frequencies(llm, family))
    for name, tensor in llm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelError(
                f"GGUF: {type(llm).__name__} has a weight {name!r} that llama.cpp's {family.arch!r} has not"
            )
        pieces.append(_piece(new, name, tensor, config, family))
    return pieces


def _piece(new: str, name: str, tensor: Tensor, config: Any, family: Family) -> Piece:
    kind = name.rsplit(".", 2)[-2]
    change: Callable[[Tensor], Tensor] | None = None
    if family.pairs and kind in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        change = partial(pair_up, heads=heads)
    elif family.plus_one and "norm" in kind:
        change = _plus_one
    if change is None:
        return Piece.of(new, tensor)
    return Piece(new, tuple(tensor.shape), lambda: as_floats(change(tensor)))


def _plus_one(tensor: Tensor) -> Tensor:
    return tensor.float() + 1


def pair_up(tensor: Tensor, *, heads: int) -> Tensor:
    """Rows of q or k from halves (0..d/2, d/2..d) to neighbours (0, d/2, 1, d/2 + 1, ...), head by head."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _frequencies(llm: Any, family: Family) -> Iterator[Piece]:
    """Factors by which the frequencies of the positions are divided, where the config scales them one by one."""
    config = llm.config
    rope = _rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        width = head_dim(config)
        plain = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        scaled = next(value for key, value in llm.named_buffers() if key.endswith("rotary_emb.inv_freq"))
        yield Piece.of("rope_freqs.weight", plain / scaled.cpu().double(), always_float=True)
    elif kind == "longrope":
        for name in ("long", "short"):
            factors: Sequence[float] = rope[f"{name}_factor"]
            yield Piece.of(f"rope_factors_{name}.weight", torch.tensor(factors, dtype=torch.float32), always_float=True)

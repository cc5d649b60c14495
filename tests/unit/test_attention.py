"""Attention inside each sample of a row: the function, the choice of implementation, the self-test of it."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from mmft.errors import ModelError
from mmft.modeling import attention


@pytest.fixture
def llm(tiny_llm_path):
    attention.register()
    return AutoModelForCausalLM.from_pretrained(tiny_llm_path).eval()


def random_heads(lengths, heads=4, kv_heads=2, size=8):
    torch.manual_seed(0)
    total = sum(lengths)
    shapes = ((1, heads, total, size), (1, kv_heads, total, size), (1, kv_heads, total, size))
    return [torch.randn(shape) for shape in shapes]


def limits(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def test_each_sample_of_a_row_attends_to_itself_only():
    lengths = [5, 3, 9]
    q, k, v = random_heads(lengths)
    got, _ = attention.varlen_attention(None, q, k, v, None, cu_seq_lens_q=limits(lengths))
    start = 0
    for n in lengths:
        part = [tensor[:, :, start : start + n] for tensor in (q, k, v)]
        alone = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True).transpose(1, 2)
        assert torch.equal(got[:, start : start + n], alone)
        start += n


def test_a_sliding_window_reaches_no_further_than_it_says():
    q, k, v = random_heads([10])
    got, _ = attention.varlen_attention(None, q, k, v, None, sliding_window=3, cu_seq_lens_q=limits([10]))
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 0], changed_v[:, :, 0] = 9.0, 9.0
    other, _ = attention.varlen_attention(
        None, q, changed_k, changed_v, None, sliding_window=3, cu_seq_lens_q=limits([10])
    )
    moved = (got - other).abs().amax(dim=(0, 2, 3)) > 0
    assert moved.tolist() == [True] * 3 + [False] * 7


def test_a_sliding_window_model_gets_its_own_logits():
    attention.register()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, attn_implementation="eager",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 12))
    positions = torch.arange(12)[None]
    with torch.no_grad():
        own = model(ids, position_ids=positions, use_cache=False).logits
        assert attention.choose(model, "varlen") == "flat"
        got = model(ids, position_ids=positions, use_cache=False, **attention.document_limits(positions)).logits
    assert (own - got).abs().max() < 1e-5


def test_limits_are_read_from_positions_that_restart():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    found = attention.document_limits(positions)
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 6]
    assert found["max_length_q"] == 3


def test_auto_chooses_attention_that_needs_no_padding(llm):
    assert attention.choose(llm, "auto") == "flat"
    assert llm.config._attn_implementation == attention.VARLEN


def test_the_self_test_finds_samples_that_see_each_other(llm):
    """SDPA without the limits of the samples, as a cache or an all-ones mask makes it."""
    llm.set_attn_implementation("sdpa")
    assert attention.isolation_error(llm) == ""  # transformers reads the packing from the positions ...
    real = llm.forward

    def with_all_ones_mask(**inputs):  # ... but not beside a mask
        return real(**inputs | {"attention_mask": torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.long)})

    class Leaking:
        config, get_input_embeddings = llm.config, staticmethod(llm.get_input_embeddings)

        def __call__(self, **inputs):
            return with_all_ones_mask(**inputs)

    assert "see each other" in attention.isolation_error(Leaking())


def test_a_model_whose_samples_leak_is_padded_and_refused_where_asked_for_by_name(llm, monkeypatch):
    monkeypatch.setattr(attention, "isolation_error", lambda model: "samples that share a row see each other")
    assert attention.choose(llm, "auto") == "padded"
    assert llm.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match=r"varlen.*see each other.*'auto'"):
        attention.choose(llm, "varlen")


@pytest.mark.parametrize("what", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_what_it_cannot_compute_is_refused_not_ignored(what):
    q, k, v = random_heads([4])
    with pytest.raises(ModelError, match=next(iter(what))):
        attention.varlen_attention(None, q, k, v, None, cu_seq_lens_q=limits([4]), **what)


def test_attention_without_limits_is_refused_rather_than_guessed(llm):
    attention.choose(llm, "varlen")
    with pytest.raises(ModelError, match="no sample limits"):
        llm(torch.zeros(1, 4, dtype=torch.long))


def test_generation_uses_sdpa_and_puts_the_implementation_back(llm):
    attention.choose(llm, "varlen")
    with attention.for_generation(llm):
        assert llm.config._attn_implementation == "sdpa"
    assert llm.config._attn_implementation == attention.VARLEN


def test_the_cuda_kernel_is_taken_only_where_it_has_windows_and_grouped_heads(monkeypatch):
    """The module may be there without them (torch < 2.12)."""
    from torch.nn.attention import varlen

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError("not called")

    available = attention._cuda_kernel_available.__wrapped__
    assert available()
    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert not available()

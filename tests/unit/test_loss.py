import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from mmft.modeling import attention, loss
from mmft.modeling.llava import LlavaModel

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi3": {},
    "smollm3": {},
}


def causal_lm(family):
    torch.manual_seed(0)
    attention.register()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family])).float()


def batch(length=40):
    ids = torch.randint(3, 97, (1, length))
    labels = ids.masked_fill(torch.rand(1, length) < 0.3, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None] % 25}


def step(model, inputs, piece):
    model.loss_piece = piece
    model.zero_grad()
    told = model(**inputs)
    told["loss"].backward()
    return told, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_loss_in_pieces_has_the_value_and_gradients_of_the_whole(family, size, frozen):
    llm = causal_lm(family)
    if frozen:
        llm.requires_grad_(False)
        llm.base_model.layers.requires_grad_(True)
    assert loss.piece_size(llm) == loss.LOGITS // 97
    attention.choose(llm, "auto")
    model = LlavaModel(llm).train()
    model.num_datasets = 2
    inputs = batch() | {"dataset_ids": torch.arange(40)[None] % 2}
    whole, expected = step(model, inputs, None)
    pieces, found = step(model, inputs, size)
    torch.testing.assert_close(pieces, whole)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


def test_a_loss_in_pieces_is_transformers_own():
    llm = causal_lm("llama")
    inputs = batch()
    model = LlavaModel(llm, layout="padded")
    model.loss_piece = 3
    own = llm(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
    torch.testing.assert_close(model(inputs["input_ids"], inputs["labels"])["loss"], own)


@pytest.mark.parametrize(("frozen", "times"), [(False, 2), (True, 1)])
def test_pieces_never_hold_all_logits_at_once_and_a_frozen_layer_makes_them_once(frozen, times):
    llm = causal_lm("llama")
    llm.lm_head.requires_grad_(not frozen)
    seen = []
    llm.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    model = LlavaModel(llm, layout="padded").train()
    inputs = batch()
    step(model, inputs, 7)
    assert max(seen) == 7
    assert sum(seen) == times * int((inputs["labels"][:, 1:] != -100).sum())


def test_without_a_gradient_pieces_keep_nothing():
    llm = causal_lm("llama").requires_grad_(False)
    hidden, targets = torch.randn(1, 20, 32), torch.randint(0, 97, (1, 20))
    losses = loss.token_losses_in_pieces(llm, hidden, targets, 6)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, loss.token_losses(llm.lm_head(hidden), targets))


def test_few_tokens_take_the_models_own_way():
    llm = causal_lm("llama")
    seen = []
    llm.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    step(LlavaModel(llm, layout="padded").train(), batch(), 40)
    assert len(seen) == 1


def test_a_model_that_makes_its_logits_otherwise_is_noticed_and_computed_whole(caplog):
    caplog.set_level("INFO")

    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            told = super().forward(*args, **kwargs)
            told.logits = 2 * told.logits
            return told

    assert loss.piece_size(Doubled(causal_lm("llama").config)) is None
    assert "at once" in caplog.text


def test_a_model_that_cannot_be_tried_is_computed_whole_and_says_why(caplog):
    caplog.set_level("INFO")

    class NoEmbeddings(LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            raise RuntimeError("this model wants input_ids")

    assert loss.piece_size(NoEmbeddings(causal_lm("llama").config)) is None
    assert "RuntimeError: this model wants input_ids" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_losses_in_pieces(dtype):
    llm = causal_lm("llama").to(dtype)
    hidden, targets = torch.randn(1, 20, 32, dtype=dtype), torch.randint(0, 97, (1, 20))
    whole = loss.token_losses(llm.lm_head(hidden), targets)
    assert whole.dtype is torch.float32
    torch.testing.assert_close(loss.token_losses_in_pieces(llm, hidden, targets, 6), whole)


def test_what_is_not_trained_counts_nowhere():
    targets = torch.tensor([[1, -100, 2]])
    losses = loss.token_losses(torch.randn(1, 3, 5), targets)
    assert losses[0, 1] == 0
    assert loss.token_mean(losses, targets, None) == losses.sum() / 2
    assert loss.token_mean(losses, targets, 8) == losses.sum() / 8

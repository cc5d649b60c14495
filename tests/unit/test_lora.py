"""Adapters: what is saved is what was trained, on a base that nobody touched."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mmft.config import LLM, Lora
from mmft.errors import CheckpointError, ModelError
from mmft.modeling.llm import load_llm
from mmft.modeling.lora import WEIGHTS, add_lora

INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")
IDS = torch.arange(24).reshape(2, 12)


def base(path, **options):
    return load_llm(LLM(path=str(path), **options), dtype=torch.float32, device=torch.device("cpu"))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(path, lora, **options):
    torch.manual_seed(1)
    return add_lora(base(path), lora, causal_lm=True, **options)


def move(model):
    """As training would: every trained number changes."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_changes_nothing_before_it_is_trained(tiny_llm_path, init):
    torch.testing.assert_close(
        logits(adapted(tiny_llm_path, Lora(r=4, init=init))), logits(base(tiny_llm_path)), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "lora",
    [
        *(Lora(r=4, init=init) for init in INITS),
        Lora(r=4, rslora=True),
        Lora(r=4, rslora=True, init="pissa"),
        Lora(r=4, alpha=32, rslora=True, init="olora"),
        Lora(r=4, dora=True),
        Lora(r=4, dora=True, rslora=True, init="gaussian"),
    ],
    ids=lambda lora: f"{lora.init}{'-dora' * lora.dora}{'-rslora' * lora.rslora}",
)
def test_a_saved_adapter_on_the_untouched_base_is_the_trained_model(tiny_llm_path, tmp_path, lora):
    model = move(adapted(tiny_llm_path, lora))
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base(tiny_llm_path), tmp_path)
    assert (logits(model) - logits(base(tiny_llm_path))).abs().max() > 0.01  # it was trained
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [*(Lora(r=4, init=init) for init in INITS), Lora(r=4, rslora=True, init="pissa")])
def test_a_read_adapter_goes_on_with_the_very_numbers_it_was_saved_with(tiny_llm_path, tmp_path, lora):
    model = move(adapted(tiny_llm_path, lora))
    model.save_pretrained(tmp_path / "one")
    again = add_lora(base(tiny_llm_path), lora, causal_lm=True, weights=tmp_path / "one")
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [n for n in before if before[n].requires_grad] == [n for n in after if after[n].requires_grad]
    again.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


def test_pissa_is_saved_as_a_plain_adapter_of_twice_the_rank(tiny_llm_path, tmp_path):
    adapted(tiny_llm_path, Lora(r=4, alpha=8, init="pissa")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


def test_a_regular_expression_chooses_layers_by_their_whole_name(tiny_llm_path):
    model = adapted(tiny_llm_path, Lora(r=4, targets=r".*layers\.1\.self_attn\.[qv]_proj"))
    assert sorted(name.partition(".lora_A")[0].partition("layers.")[2] for name, _ in model.named_parameters()
                  if ".lora_A" in name) == ["1.self_attn.q_proj", "1.self_attn.v_proj"]  # fmt: skip


def test_targets_that_match_nothing_name_the_layers_there_are(tiny_llm_path):
    with pytest.raises(ModelError, match=r"lora.targets .*no_such.*linear layers: .*q_proj"):
        adapted(tiny_llm_path, Lora(targets=("no_such",)))


def test_an_adapter_file_with_a_missing_tensor_is_refused(tiny_llm_path, tmp_path):
    adapted(tiny_llm_path, Lora(r=4)).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = sorted(state)[0]
    del state[name]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        add_lora(base(tiny_llm_path), Lora(r=4), weights=tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_of_new_tokens_an_adapter_holds_their_rows_and_no_embedding(tiny_llm_path, tmp_path, tied):
    folder = tmp_path / "llm"
    shutil.copytree(tiny_llm_path, folder)
    if tied:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        state = load_file(folder / "model.safetensors")
        del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    size = base(folder).get_input_embeddings().num_embeddings
    new = {"new_tokens": ("<a>", "<b>")}
    first = base(folder, **new)
    assert first.get_input_embeddings().num_embeddings == size + 2
    assert torch.equal(first.get_input_embeddings().weight[size], first.get_input_embeddings().weight[:size].mean(0))
    model = move(add_lora(first, Lora(r=4), causal_lm=True, new_tokens=[size, size + 1]))
    model.save_pretrained(tmp_path / "adapter")
    rows = {n: list(t.shape) for n, t in load_file(tmp_path / "adapter" / WEIGHTS).items() if ".lora_" not in n}
    assert list(rows.values()) == [[2, 32]] * (1 if tied else 2)
    again = add_lora(
        base(folder, **new), Lora(r=4), causal_lm=True, weights=tmp_path / "adapter", new_tokens=[size, size + 1]
    )
    with pytest.raises(CheckpointError, match=r"the rows of other new tokens than model\.llm\.new_tokens"):
        add_lora(base(folder), Lora(r=4), causal_lm=True, weights=tmp_path / "adapter")
    ids = torch.tensor([[5, size, size + 1, 7]])
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=ids).logits for m in (model, again))
    assert torch.equal(ours, theirs)
    untrained = first_logits(base(folder, **new), ids)
    assert (ours - untrained)[..., -2:].abs().max() > 0.01  # the head's rows of the new tokens moved as well


def first_logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits

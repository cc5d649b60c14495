"""`mmft convert hf`: encoders, projectors, adapters and templates of every kind, each through the gate by itself."""

import json

import pytest
import torch
from convert_models import LORA, TOLERANCE, trained

from mmft.convert.hf.llava import export
from mmft.convert.hf.projector import read_projector
from mmft.errors import ModelError

CPU = torch.device("cpu")


ENCODERS = {
    "dinov2, whose positions are interpolated unasked": ("dinov2", {"image_size": 42}),
    "clip for larger pictures": ("clip", {"image_size": 42}),
    "siglip for larger pictures, padded": ("siglip", {"image_size": 42, "pad_to_square": True}),
    "clip's embeddings": ("clip", {"select_layer": 0, "pad_to_square": False}),
    "siglip's last block": ("siglip", {"select_layer": -1}),
    "dinov2's last block": ("dinov2", {"select_layer": -1}),
    "vit": ("vit", {}),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_layers_and_sizes_survive(case, plugins, tmp_path):
    encoder, options = ENCODERS[case]
    folder = trained(tmp_path, plugins, encoder=encoder, encoder_options=options)
    report = export(folder, tmp_path / "out", plugins, device=CPU)
    assert all(outcome.same_answer and outcome.relative < TOLERANCE for outcome in report.outcomes)


TRAINED = {
    "vision lora, rows beyond the vocabulary": {"llm": {}, "vision": {"lora": LORA}, "family": "qwen3", "rows": 40},
    "whole encoder": {"vision": {"trainable": True}, "encoder": "siglip"},
    "whole llm": {"llm": {"trainable": True}},
    "new tokens, tied": {"llm": {"lora": LORA, "new_tokens": ("<a>", "<b>")}, "family": "qwen2"},
    "vicuna": {"template": "vicuna", "bos": "<s>", "eos": "</s>", "special": ("<unk>", "<s>", "</s>")},
    "the tokenizer's own template": {"template": "auto"},
}


@pytest.mark.parametrize("case", TRAINED)
def test_whatever_was_trained_is_in_it(case, plugins, tmp_path):
    report = export(trained(tmp_path, plugins, **TRAINED[case]), tmp_path / "out", plugins, device=CPU)
    assert len(report.outcomes) == 11
    assert all(outcome.same_answer and outcome.relative < TOLERANCE for outcome in report.outcomes)


def test_a_projector_of_other_layers_is_refused_with_what_to_choose():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())
    with pytest.raises(ModelError, match=r"'acme': SiLU has no place.*train with 'mlp2x_gelu' or 'pixel_shuffle'"):
        read_projector(layers, "acme")


def test_registers_before_the_patches_are_left_out(plugins, tmp_path):
    from transformers import AutoConfig, AutoModel

    folder = trained(tmp_path, plugins, encoder="dinov2")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    config = AutoConfig.for_model("dinov2_with_registers", num_register_tokens=3, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    report = export(folder, tmp_path / "out", plugins, device=CPU)
    assert report.verified
    content = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (content["num_prefix_tokens"], content["image_seq_length"]) == (4, 16)


def test_a_base_model_without_a_chat_template_goes_on_from_a_text(plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder=None, template="auto", chat_template=None, bos="<|im_start|>")
    report = export(folder, tmp_path / "out", plugins, device=CPU)
    assert [outcome.probe for outcome in report.outcomes] == [
        "a question", "unicode", "code", "white space", "a long text"
    ]  # fmt: skip
    assert all(outcome.same_answer and outcome.relative < TOLERANCE for outcome in report.outcomes)
    assert list(report.left_out) == ["two turns", "a system text"]
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    parity = json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))
    assert "no chat_template" in parity["left_out"]["two turns"]


@pytest.mark.parametrize(("dtype", "most"), [("fp32", TOLERANCE), ("fp16", 5e-3)])
def test_packed_weights_are_unpacked_in_the_precision_asked_for(dtype, most, plugins, tmp_path):
    folder = trained(tmp_path, plugins, precision="bf16", llm={"lora": LORA, "quantization": "nf4"}, encoder=None)
    report = export(folder, tmp_path / "out", plugins, device=CPU, dtype=dtype)
    assert max(outcome.relative for outcome in report.outcomes) < most


def test_a_model_that_caps_its_logits_is_refused(plugins, tmp_path):
    folder = trained(tmp_path, plugins, family="gemma2")
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM caps or scales its logits.*convert merge"):
        export(folder, tmp_path / "out", plugins, device=CPU)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []

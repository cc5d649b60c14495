"""Keys, names and types of GGUF files, and the chat formats beside them; what llama.cpp makes of them is elsewhere."""

from pathlib import Path

import jinja2
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from mmft.convert.chat_jinja import SAID
from mmft.convert.gguf.chat import MARKED, modelfile
from mmft.convert.gguf.file import PROVES, QUANTS, Piece, find_quant, ggml_type, write_file
from mmft.convert.gguf.text import find_family, pair_up, text_file
from mmft.convert.gguf.vision import check_pictures, check_projector, encoder_tensors
from mmft.errors import CheckpointError, ModelError
from mmft.images import ImageTransform

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize(
    ("family", "options", "told"),
    [
        ("mamba", {}, r"'mamba' is not among those written here \(llama, mistral, qwen2.*convert hf"),
        ("llama", {"hidden_act": "relu"}, "'llama' graph does not know activation 'relu'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7"),
        ("gemma", {"tie_word_embeddings": False}, "an output head of its own"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(family, options, told):
    config = AutoConfig.for_model(family, **(SMALL if family != "mamba" else {}) | options)
    with pytest.raises(ModelError, match=told):
        text_file(config, 100, name="x", file_type="MOSTLY_F16")


def test_rotated_pairs_become_neighbours():
    rows = torch.arange(8)[:, None]  # two heads of four rows
    assert pair_up(rows, heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert find_family(AutoConfig.for_model("llama")).pairs
    assert not find_family(AutoConfig.for_model("qwen2")).pairs


@pytest.mark.parametrize(
    ("name", "shape", "quant", "kind"),
    [
        ("blk.0.attn_q.weight", (64, 64), "q4_0", "Q4_0"),
        ("blk.0.attn_q.weight", (64, 40), "q4_0", "F16"),  # 40 is no multiple of a block
        ("output.weight", (64, 64), "q4_0", "Q8_0"),
        ("token_embd.weight", (64, 64), "q5_1", "Q5_1"),
        ("blk.0.attn_norm.weight", (64,), "q4_0", "F32"),
        ("blk.0.attn_q.bias", (64,), "f16", "F32"),
        ("output.weight", (64, 64), "bf16", "BF16"),
    ],
)
def test_vectors_stay_floats_and_the_head_keeps_eight_bits(name, shape, quant, kind):
    assert ggml_type(Piece.of(name, torch.zeros(shape)), quant, head="output.weight").name == kind


def test_types_that_only_llama_cpp_writes_are_refused_with_its_command():
    with pytest.raises(ModelError, match=r"--quant q4_k_m: .*llama-quantize OUT/model-f16.gguf .* Q4_K_M"):
        find_quant("q4_k_m")


def test_a_type_whose_rounding_hides_a_lost_adapter_is_never_its_own_proof():
    for name, quant in QUANTS.items():
        assert QUANTS[PROVES.get(name, name)].tolerance < 0.1 / 4
        assert (name in PROVES) == (quant.tolerance > 0.02)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("rows", [1, 100_000], ids=["in the last bytes", "in the middle"])
def test_a_full_disk_is_one_line(rows):
    from gguf import GGUFWriter

    tensors = [Piece.of(f"blk.{k}.attn_q.weight", torch.zeros(rows, 32)) for k in range(2)]
    with pytest.raises(CheckpointError, match=r"^/dev/full cannot be written: [^\n]*; make room") as told:
        write_file(Path("/dev/full"), GGUFWriter(None, "llama"), tensors, "f16")
    assert "\n" not in str(told.value)


def said(content):
    head = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(MARKED + "{{- said(content) -}}")
    return head.render(content=content)


IMAGE, ASK = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        ("What?", "What?"),
        ([IMAGE, ASK], "<__media__>\nWhat?"),
        ("<__media__>What?", "<__media__>\nWhat?"),
        ("<__media__>\nWhat?", "<__media__>\nWhat?"),
        ("<__media_x7__><__media_x7__>What?", "<__media_x7__>\n<__media_x7__>\nWhat?"),  # llama-server's marks
        ([{"type": "text", "text": "<__media__>"}, ASK], "<__media__>\nWhat?"),  # llama-cpp-python's parts
        ("Is <__media__> red?", "Is <__media__> red?"),
        ("if a__>b: pass", "if a__>b: pass"),
        ([ASK], "What?"),
    ],
)
def test_a_picture_in_front_is_followed_by_the_line_break_of_training(content, whole):
    assert said(content) == whole


def test_the_head_that_is_replaced_is_the_one_exports_have():
    assert SAID.startswith("{%- macro said(content) -%}")
    assert MARKED.startswith("{%- macro said(content) -%}")


def test_the_modelfile_names_both_files_the_turns_and_the_stops(plugins):

    template = plugins.chat_templates.get("chatml")
    text = modelfile("model-f16.gguf", "mmproj-f16.gguf", template, 2048, ["pictures are padded"])
    assert text.splitlines()[:3] == ["# pictures are padded", "FROM ./model-f16.gguf", "FROM ./mmproj-f16.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert '{{- "<|im_end|>\\n<|im_start|>assistant\\n" }}' in text
    assert text.count("{{- if") + text.count("{{- range") == text.count("{{- end }}")
    assert "no Go template" in modelfile("model-f16.gguf", None, None, 2048)


PADDED = ImageTransform(
    resize=28, crop=(28, 28), mean=(0.48145466, 0.4578275, 0.40821073), std=(0.3, 0.3, 0.3), pad_to_square=True
)


def test_pictures_that_would_be_seen_otherwise_are_refused():
    assert check_pictures(PADDED, "clip", square_only=False) == ()
    stretched = ImageTransform(resize=(28, 28), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ModelError, match=r"stretches pictures that are no squares.*pad_to_square=True.*--square-only"):
        check_pictures(stretched, "siglip", square_only=False)
    assert "stretches" in check_pictures(stretched, "siglip", square_only=True)[0]


def test_a_projector_of_other_layers_is_refused():
    check_projector(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), "mlp2x_gelu")
    with pytest.raises(ModelError, match=r"'linear': llama\.cpp's LLaVA graph has exactly two linear layers"):
        check_projector(nn.Linear(2, 2), "linear")


def test_layer_scales_are_multiplied_into_the_matrices_before_them():
    state = {
        "embeddings.position_embeddings": torch.zeros(1, 5, 2),
        "encoder.layer.0.attention.o_proj.weight": torch.ones(2, 2),
        "encoder.layer.0.attention.o_proj.bias": torch.ones(2),
        "encoder.layer.0.layer_scale1.lambda1": torch.tensor([2.0, 3.0]),
        "encoder.layer.1.attention.o_proj.bias": torch.ones(2),  # behind the layer that is read
    }
    from mmft.convert.gguf.vision import DINO_NAMES

    found = encoder_tensors(state, DINO_NAMES, 1)
    assert found["v.blk.0.attn_out.weight"].tolist() == [[2.0, 2.0], [3.0, 3.0]]
    assert found["v.blk.0.attn_out.bias"].tolist() == [2.0, 3.0]
    assert set(found) == {"v.position_embd.weight", "v.blk.0.attn_out.weight", "v.blk.0.attn_out.bias"}
    with pytest.raises(ModelError, match=r"a weight 'gate' that llama\.cpp's graph has not"):
        encoder_tensors(state | {"gate": torch.ones(1)}, DINO_NAMES, 1)

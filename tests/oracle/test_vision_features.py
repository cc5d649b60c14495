"""The encoders give, bit for bit, the hidden states of the whole transformers model, without its extra tokens.

Bit for bit, because the same kernels run on the same shapes; leaving later blocks away changes nothing before them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    ViTForImageClassification,
)

from mmft.testing import save_image_processor, tiny_vision
from mmft_plugins import hf_vision

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
VISION: dict[str, Any] = {**SMALL, "image_size": 28, "patch_size": 7}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "vit": 1, "dinov2_with_registers": 5, "deit": 2, "dinov3_vit": 3}
LAYERS = [0, 1, 2, 3, -1, -2, -3, -4]


def save(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    square = {"height": 28, "width": 28}
    save_image_processor(folder, "ViTImageProcessor", size=square, crop_size=square)
    return folder


def checkpoint(kind: str, folder: Path) -> Path:
    if kind in ("clip", "siglip", "dinov2", "vit"):
        return tiny_vision(folder, kind)
    extra = {"num_register_tokens": 2} if kind == "dinov3_vit" else {}
    return save(folder, AutoModel.from_config(AutoConfig.for_model(kind, **VISION, **extra)))


def pictures(size: int = 28) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hidden_states(model: PreTrainedModel, pixels: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    states: tuple[torch.Tensor, ...] = model.eval()(pixels, output_hidden_states=True, **options).hidden_states
    return states


@pytest.mark.parametrize("kind", PREFIX)
def test_features_equal_the_whole_models_hidden_states_at_every_layer(kind: str, tmp_path: Path) -> None:
    checkpoint(kind, tmp_path)
    states = hidden_states(AutoModel.from_pretrained(tmp_path), pictures())
    assert len(states) == 4
    assert states[0].shape[1] == 16 + PREFIX[kind]
    for layer in LAYERS:
        encoder = hf_vision.build(path=tmp_path, select_layer=layer)
        with torch.no_grad():
            assert torch.equal(encoder(pictures()), states[layer][:, PREFIX[kind] :]), layer


def test_where_a_model_records_its_normed_output_as_the_last_state_so_do_we_and_nowhere_else(tmp_path: Path) -> None:
    tiny_vision(tmp_path, "siglip")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_last_hidden_states": True}))
    with torch.no_grad():
        whole = AutoModel.from_pretrained(tmp_path)(pictures(), output_hidden_states=True)
    assert torch.equal(whole.hidden_states[-1], whole.last_hidden_state)
    for layer in LAYERS:
        encoder = hf_vision.build(path=tmp_path, select_layer=layer)
        with torch.no_grad():
            assert torch.equal(encoder(pictures()), whole.hidden_states[layer]), layer


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "vit"])
def test_the_last_layer_is_the_block_before_the_final_norm(kind: str, tmp_path: Path) -> None:
    checkpoint(kind, tmp_path)
    with torch.no_grad():
        normed = AutoModel.from_pretrained(tmp_path)(pictures()).last_hidden_state[:, PREFIX[kind] :]
        assert not torch.allclose(hf_vision.build(path=tmp_path, select_layer=-1)(pictures()), normed)


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2", "dinov2_with_registers"])
def test_features_at_another_image_size_equal_the_interpolating_model(kind: str, tmp_path: Path) -> None:
    checkpoint(kind, tmp_path)
    options = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
    states = hidden_states(AutoModel.from_pretrained(tmp_path), pictures(42), **options)
    encoder = hf_vision.build(path=tmp_path, image_size=42)
    with torch.no_grad():
        assert torch.equal(encoder(pictures(42)), states[-2][:, PREFIX[kind] :])


def _clip(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16))
    save(folder, model)
    return model, model.vision_model


def _siglip(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
    save(folder, model)
    return model, model.vision_model


def _vit_classifier(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = ViTForImageClassification(AutoConfig.for_model("vit", **VISION))
    save(folder, model)
    return model, model.base_model


@pytest.mark.parametrize("make", [_clip, _siglip, _vit_classifier])
def test_of_a_composite_checkpoint_the_vision_part_is_loaded_alone(
    make: Callable[[Path], tuple[PreTrainedModel, PreTrainedModel]], tmp_path: Path
) -> None:
    whole, vision = make(tmp_path)
    encoder = hf_vision.build(path=tmp_path)
    prefix = vision.config.model_type != "siglip_vision_model"
    with torch.no_grad():
        assert torch.equal(encoder(pictures()), hidden_states(vision, pictures())[-2][:, int(prefix) :])
    assert sum(p.numel() for p in encoder.parameters()) < sum(p.numel() for p in vision.parameters())
    assert sum(p.numel() for p in vision.parameters()) < sum(p.numel() for p in whole.parameters())


def test_the_hubs_spelling_of_clips_weights_loads(tmp_path: Path) -> None:
    """openai/clip-vit-large-patch14-336 writes `vision_model.*` and, as old files do, position_ids."""
    from safetensors.torch import load_file, save_file

    _, vision = _clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "vision_model.embeddings.class_embedding" in weights
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        features = hf_vision.build(path=tmp_path)(pictures())
    assert torch.equal(features, hidden_states(vision, pictures())[-2][:, 1:])


def test_half_precision_files_are_loaded_as_float32_without_changing_a_value(tmp_path: Path) -> None:
    tiny_vision(tmp_path, "clip")
    model = AutoModel.from_pretrained(tmp_path).half()
    model.save_pretrained(tmp_path)
    encoder = hf_vision.build(path=tmp_path)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(encoder(pictures()), hidden_states(model.float(), pictures())[-2][:, 1:])


def test_the_encoder_follows_its_weights_dtype(tmp_path: Path) -> None:
    tiny_vision(tmp_path, "clip")
    encoder = hf_vision.build(path=tmp_path).to(torch.bfloat16)
    model = AutoModel.from_pretrained(tmp_path).to(torch.bfloat16)
    with torch.no_grad():
        features = encoder(pictures())
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, hidden_states(model, pictures())[-2][:, 1:])


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_projected_features_equal_those_of_transformers_llava(kind: str, layer: int, tmp_path: Path) -> None:
    tiny_vision(tmp_path, kind)
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(tmp_path),
        text_config=LlamaConfig(**SMALL, vocab_size=50),
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if kind == "clip" else "full",  # drop token 0, or nothing
    )
    llava = LlavaModel(config).eval()
    llava.vision_tower.load_state_dict(AutoModel.from_pretrained(tmp_path).state_dict())
    encoder = hf_vision.build(path=tmp_path, select_layer=layer)
    with torch.no_grad():
        theirs = torch.stack(list(llava.get_image_features(pictures()).pooler_output))
        ours = llava.multi_modal_projector(encoder(pictures()))
    assert torch.equal(ours, theirs)

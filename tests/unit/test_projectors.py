"""The shipped projectors: weight layouts of the public checkpoints, token counts, and options that cannot work."""

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Idefics3Config, InternVLConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel

from mmft import ProjectorSpec
from mmft_plugins import llava
from mmft_plugins._projector import space_to_depth

SPECS = {spec.name: spec for spec in llava.mmft_projectors()}
NAMES = ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu", "pixel_shuffle"]


def features(patches: int = 16, width: int = 8, images: int = 2) -> torch.Tensor:
    return torch.randn(images, patches, width, generator=torch.Generator().manual_seed(0))


def linears(module: nn.Module) -> Sequence[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def test_the_projectors_offered() -> None:
    assert list(SPECS) == NAMES
    for spec in SPECS.values():
        again = pickle.loads(pickle.dumps(spec))
        assert isinstance(again, ProjectorSpec)
        assert again.name == spec.name
        assert again.build(8, 12)(features()).shape[-1] == 12


@pytest.mark.parametrize("name", NAMES)
def test_a_projector_gives_as_many_tokens_as_it_says(name: str) -> None:
    spec = SPECS[name]
    assert spec.build(8, 12)(features(36)).shape == (2, spec.num_tokens(36), 12)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_an_mlp_is_llavas_sequential_and_takes_its_weights_one_to_one(depth: int) -> None:
    modules: list[nn.Module] = [nn.Linear(8, 12)]  # llava/model/multimodal_projector/builder.py, its loop
    for _ in range(1, depth):
        modules.append(nn.GELU())
        modules.append(nn.Linear(12, 12))
    theirs = nn.Sequential(*modules)
    ours = SPECS[f"mlp{depth}x_gelu"].build(8, 12)
    saved = {f"model.mm_projector.{key}": value for key, value in theirs.state_dict().items()}
    ours.load_state_dict({key.removeprefix("model.mm_projector."): value for key, value in saved.items()})
    assert torch.equal(ours(features()), theirs(features()))


def test_linear_has_llavas_two_weights() -> None:
    assert set(SPECS["linear"].build(8, 12).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("name", NAMES)
def test_init_std_sets_the_last_layer_only(name: str) -> None:
    torch.manual_seed(0)
    plain = linears(SPECS[name].build(256, 256))
    torch.manual_seed(0)
    small = linears(SPECS[name].build(256, 256, init_std=0.001))
    assert small[-1].weight.std().item() == pytest.approx(0.001, rel=0.02)  # 65,536 draws: 5 sigma is 1.4 %
    assert plain[-1].weight.std().item() > 0.01
    assert torch.equal(small[-1].bias, plain[-1].bias)
    for one, other in zip(small[:-1], plain[:-1], strict=True):
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init_std", [0.0, -1.0])
def test_an_init_std_that_is_not_positive_is_refused(name: str, init_std: float) -> None:
    with pytest.raises(ValueError, match=rf"init_std={init_std}"):
        SPECS[name].build(8, 12, init_std=init_std)


def test_the_depth_in_an_mlps_name_is_not_an_option() -> None:
    with pytest.raises(TypeError, match="depth"):
        SPECS["mlp2x_gelu"].build(8, 12, depth=3)


@pytest.mark.parametrize(("scale", "grid"), [(1, 4), (2, 4), (2, 6), (3, 6), (3, 27), (4, 8)])
def test_a_shuffled_token_holds_its_square_of_patches_row_by_row(scale: int, grid: int) -> None:
    patches = torch.arange(grid * grid).reshape(1, -1, 1) * 10 + torch.arange(3)  # 3 channels, each value once
    shuffled = space_to_depth(patches, scale)
    assert shuffled.shape == (1, (grid // scale) ** 2, scale * scale * 3)
    for token in range(shuffled.shape[1]):
        top, left = token // (grid // scale) * scale, token % (grid // scale) * scale
        square = [(top + dy) * grid + left + dx for dy in range(scale) for dx in range(scale)]
        assert shuffled[0, token].tolist() == [patch * 10 + channel for patch in square for channel in range(3)]


@pytest.mark.parametrize("scale", [2, 3])
def test_without_norm_and_bias_pixel_shuffle_equals_transformers_idefics3_connector(scale: int) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = Idefics3Config(
        vision_config={**small, "image_size": 12, "patch_size": 2},
        text_config={**small, "model_type": "llama", "hidden_size": 12, "vocab_size": 10},
        scale_factor=scale,
        pad_token_id=0,
    )
    theirs = Idefics3Connector(config)
    ours = SPECS["pixel_shuffle"].build(8, 12, scale=scale, depth=1, norm=False, bias=False)
    assert len(ours.state_dict()) == 1
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    assert torch.equal(ours(features(36)), theirs(features(36)))


def test_by_default_pixel_shuffle_equals_transformers_internvl() -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = InternVLConfig(
        vision_config={**small, "image_size": [12, 12], "patch_size": [2, 2]},
        text_config={**small, "model_type": "llama", "hidden_size": 12, "vocab_size": 10},
        downsample_ratio=0.5,
    )
    model = InternVLModel(config)
    ours = SPECS["pixel_shuffle"].build(8, 12)
    ours.load_state_dict(dict(zip(ours.state_dict(), model.multi_modal_projector.state_dict().values(), strict=True)))
    shuffled = model.pixel_shuffle(features(36).reshape(2, 6, 6, 8), scale_factor=0.5).reshape(2, 9, 32)
    assert torch.equal(ours(features(36)), model.multi_modal_projector(shuffled))


def test_the_parts_of_pixel_shuffle_follow_its_options() -> None:
    def build(in_features: int, out_features: int, **options: int | bool) -> Any:
        return SPECS["pixel_shuffle"].build(in_features, out_features, **options)

    def kinds(**options: int | bool) -> list[str]:
        return [type(layer).__name__ for layer in build(8, 12, **options).mlp]

    assert kinds() == ["LayerNorm", "Linear", "GELU", "Linear"]
    assert kinds(depth=1, norm=False) == ["Linear"]
    assert kinds(depth=3) == ["LayerNorm", "Linear", "GELU", "Linear", "GELU", "Linear"]
    assert build(8, 12, scale=3).mlp[0].normalized_shape == (72,)


@pytest.mark.parametrize(
    ("patches", "scale", "message"),
    [
        (729, 2, r"27 x 27 patches does not divide by scale=2; this grid takes 1, 3, 9, 27"),
        (36, 4, r"6 x 6 patches does not divide by scale=4; this grid takes 1, 2, 3, 6"),
        (16, 3, r"4 x 4 patches does not divide by scale=3"),
        (200, 2, r"scale=2 needs a square grid of patches; 200 patches .*14 x 14 = 196"),
        (257, 2, r"257 patches"),
    ],
)
def test_a_grid_that_does_not_divide_is_refused_with_both_numbers(patches: int, scale: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPECS["pixel_shuffle"].num_tokens(patches, scale=scale)


def test_token_counts_of_real_encoders() -> None:
    count = SPECS["pixel_shuffle"].num_tokens
    assert count(576) == 144  # CLIP-L/14 at 336
    assert count(729, scale=3) == 81  # SigLIP-so400m/14 at 384
    assert count(1024, scale=4) == 64  # SigLIP 2 B/16 at 512, as in nanoVLM
    assert SPECS["mlp2x_gelu"].num_tokens(576) == 576


@pytest.mark.parametrize(("option", "value"), [("scale", 0), ("scale", -2), ("depth", 0)])
def test_a_scale_or_depth_below_one_is_refused(option: str, value: int) -> None:
    spec = SPECS["pixel_shuffle"]
    for function in (lambda **options: spec.build(8, 12, **options), lambda **options: spec.num_tokens(16, **options)):
        with pytest.raises(ValueError, match=rf"{option}={value}; it must be 1 or more"):
            function(**{option: value})

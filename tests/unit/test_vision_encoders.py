"""The shipped vision encoders: what describe promises build keeps, and what cannot work is refused with a reason."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, ViTForImageClassification
from transformers.utils import logging

from mmft.errors import ModelError
from mmft.testing import save_image_processor, tiny_vision
from mmft_plugins import hf_vision, llava

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
BUILDERS = {"clip": llava, "siglip": hf_vision, "dinov2": hf_vision, "vit": hf_vision}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tiny_vision(tmp_path, "clip")


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_model(folder: Path, model_type: str, **settings: Any) -> Path:
    AutoModel.from_config(AutoConfig.for_model(model_type, **{**SMALL, **settings})).save_pretrained(folder)
    square = {"height": 28, "width": 28}
    save_image_processor(folder, "ViTImageProcessor", size=square, crop_size=square)
    return folder


@pytest.mark.parametrize("module", [hf_vision, llava])
def test_names_and_options_of_the_offers(module: Any) -> None:
    import inspect

    specs = list(module.mmft_vision_encoders())
    assert [spec.name for spec in specs] == (["clip"] if module is llava else ["siglip", "dinov2", "vit"])
    for spec in specs:
        assert pickle.loads(pickle.dumps(spec)) == spec
        options = inspect.signature(spec.describe).parameters
        assert list(options) == ["path", "select_layer", "pad_to_square", "image_size", "revision"]
        assert list(inspect.signature(spec.build).parameters.values()) == list(options.values())
        assert options["select_layer"].default == -2
        assert options["pad_to_square"].default is (spec.name == "clip")


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_what_describe_promises_the_built_encoder_gives(kind: str, tmp_path: Path) -> None:
    path = tiny_vision(tmp_path, kind, width=24)
    module = BUILDERS[kind]
    spec = next(spec for spec in module.mmft_vision_encoders() if spec.name == kind)
    info = spec.describe(path=path)
    encoder = spec.build(path=path)
    assert (info.hidden_size, info.num_patches) == (24, 16)
    pixels = torch.stack([info.transform(Image.new("RGB", (50, 30), color)) for color in ("red", "blue")])
    features = encoder(pixels)
    assert features.shape == (2, 16, 24)
    assert features.dtype == torch.float32
    assert not torch.equal(features[0], features[1])
    assert not encoder.training


def test_describe_reads_no_weights(clip: Path) -> None:
    (clip / "model.safetensors").unlink()
    assert llava.describe_clip(path=clip).num_patches == 16
    with pytest.raises(ModelError, match=r"weights cannot be loaded.*model\.safetensors"):
        llava.build_clip(path=clip)


def test_the_transform_pickles_into_workers(clip: Path) -> None:
    transform = llava.describe_clip(path=clip).transform
    image = Image.linear_gradient("L").convert("RGB").resize((40, 30))
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))


def test_the_plugins_do_not_import_torch() -> None:
    code = "import sys, mmft_plugins.hf_vision, mmft_plugins.llava as p; list(p.mmft_projectors()); "
    code += "list(p.mmft_vision_encoders()); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("select_layer", "blocks"), [(-1, 3), (3, 3), (-2, 2), (2, 2), (1, 1), (0, 1), (-4, 1)])
def test_blocks_behind_the_selected_layer_are_not_built(clip: Path, select_layer: int, blocks: int) -> None:
    encoder = llava.build_clip(path=clip, select_layer=select_layer)
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    assert [len(module) for module in lists] == [blocks]


@pytest.mark.parametrize("select_layer", [4, -5, 100])
def test_a_layer_that_does_not_exist_is_refused_with_the_allowed_range(clip: Path, select_layer: int) -> None:
    for function in (llava.describe_clip, llava.build_clip):
        with pytest.raises(ModelError, match=rf"select_layer={select_layer}.*3 blocks.*0 .* to 3 .*-4 to -1"):
            function(path=clip, select_layer=select_layer)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_image_size_changes_the_number_of_patches_and_the_picture_seen(kind: str, tmp_path: Path) -> None:
    tiny_vision(tmp_path, kind)
    info = hf_vision.describe(path=tmp_path, image_size=42)
    pixels = info.transform(Image.new("RGB", (90, 60), "red"))
    assert pixels.shape == (3, 42, 42)
    assert info.num_patches == 36
    assert hf_vision.build(path=tmp_path, image_size=42)(pixels[None]).shape == (1, 36, 32)


@pytest.mark.parametrize("size", [{"shortest_edge": 40}, {"height": 40, "width": 44}])
@pytest.mark.parametrize("crop", [True, False])
def test_with_image_size_the_processors_resize_and_crop_give_way_to_it(
    clip: Path, size: dict[str, int], crop: bool
) -> None:
    edit_json(clip / "preprocessor_config.json", size=size, do_center_crop=crop)
    image = Image.new("RGB", (90, 60), "black")
    image.paste("white", (0, 0, 90, 4))  # the top edge stays in view: the short side is not cropped
    pixels = hf_vision.describe(path=clip, image_size=21).transform(image)
    assert pixels.shape == (3, 21, 21)
    assert (pixels[:, 0] > pixels[:, 10]).all()


def test_a_remainder_at_the_edge_makes_no_patch(tmp_path: Path) -> None:
    tiny_vision(tmp_path, "siglip")  # SigLIP-so400m: 384 pixels, patches of 14, 27 x 27 of them
    info = hf_vision.describe(path=tmp_path, image_size=40)
    assert info.num_patches == 25
    assert hf_vision.build(path=tmp_path, image_size=40)(torch.zeros(1, 3, 40, 40)).shape == (1, 25, 32)


def test_an_encoder_that_cannot_take_the_image_size_is_refused_when_built(tmp_path: Path) -> None:
    save_model(tmp_path, "aimv2_vision_model", num_channels=3)
    assert hf_vision.build(path=tmp_path)(torch.zeros(1, 3, 28, 28)).shape == (1, 16, 32)
    with pytest.raises(ModelError, match=r"Aimv2VisionModel does not.*42 x 42 .*made for 28 x 28"):
        hf_vision.build(path=tmp_path, image_size=42)


def test_an_encoder_whose_tokens_are_not_prefix_and_patches_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "yolos", image_size=[28, 28], num_detection_tokens=5)  # detection tokens are at the end
    with pytest.raises(ModelError, match=r"22 tokens, and patch 1 is seen in token 2, not in 7"):
        hf_vision.build(path=tmp_path)


def test_an_encoder_that_is_not_a_vit_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("resnet").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"resnet.* has no .*patch_size"):
        hf_vision.describe(path=tmp_path)


def test_a_picture_smaller_than_a_patch_is_refused(clip: Path) -> None:
    with pytest.raises(ModelError, match=r"5 x 5 are smaller than one patch, 7 x 7"):
        llava.describe_clip(path=clip, image_size=5)


def test_a_missing_path_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere.*config\.json.*hub"):
        llava.describe_clip(path=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_folder_without_its_config_says_which_file_is_missing(clip: Path, name: str) -> None:
    (clip / name).unlink()
    with pytest.raises(ModelError, match=rf"has no {name}.*; it holds .*model\.safetensors"):
        llava.describe_clip(path=clip)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_damaged_config_is_a_model_error(clip: Path, name: str) -> None:
    (clip / name).write_text("{")
    with pytest.raises(ModelError, match=name):
        llava.describe_clip(path=clip)


def test_an_image_processor_with_steps_of_its_own_is_refused(tmp_path: Path) -> None:
    tiny_vision(tmp_path, "clip")
    edit_json(tmp_path / "preprocessor_config.json", image_processor_type="LlavaImageProcessor", do_pad=True)
    with pytest.raises(ModelError, match=r"LlavaImageProcessorPil does other steps \(do_pad\)"):
        llava.describe_clip(path=tmp_path)


def test_an_image_processor_that_does_not_do_what_its_settings_say_is_refused(tmp_path: Path) -> None:
    tiny_vision(tmp_path, "clip")  # ConvNext's resizes by crop_pct, which none of the common settings tells
    edit_json(
        tmp_path / "preprocessor_config.json",
        image_processor_type="ConvNextImageProcessor",
        do_center_crop=None,
        crop_size=None,
        crop_pct=0.5,
    )
    with pytest.raises(ModelError, match=r"ConvNextImageProcessorPil gives other pixels than its settings say"):
        llava.describe_clip(path=tmp_path, image_size=28)


def test_a_processor_that_also_bounds_the_long_edge_is_refused(clip: Path) -> None:
    size = {"shortest_edge": 28, "longest_edge": 100}  # it shows on long pictures only
    edit_json(clip / "preprocessor_config.json", size=size, do_center_crop=True)
    with pytest.raises(ModelError, match="longest_edge"):
        llava.describe_clip(path=clip)


def test_switches_and_factors_of_the_processor_are_obeyed(clip: Path) -> None:
    white = Image.new("RGB", (28, 28), "white")
    edit_json(clip / "preprocessor_config.json", do_normalize=False)
    assert (llava.describe_clip(path=clip).transform(white) == 1.0).all()
    edit_json(clip / "preprocessor_config.json", rescale_factor=1 / 51)
    assert (llava.describe_clip(path=clip).transform(white) == 5.0).all()
    edit_json(clip / "preprocessor_config.json", do_rescale=False)
    assert (llava.describe_clip(path=clip).transform(white) == 255.0).all()


def test_a_hub_name_and_revision_are_looked_up(tmp_path: Path) -> None:
    """Two revisions in a hub cache, read offline in a process of its own: the cache's place is fixed at import."""
    repo = tmp_path / "hub/models--acme--encoder"
    for commit, size in (("1" * 40, 28), ("2" * 40, 42)):
        (repo / "snapshots" / commit).mkdir(parents=True)
        tiny_vision(repo / "snapshots" / commit, "clip", image_size=size)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("1" * 40)
    (repo / "refs/larger").write_text("2" * 40)
    code = """if True:
        import torch
        from mmft_plugins import llava
        for options in ({}, {"revision": "larger"}, {"revision": "2" * 40}):
            info = llava.describe_clip(path="acme/encoder", **options)
            size = info.transform.output_size
            print(size, llava.build_clip(path="acme/encoder", **options)(torch.zeros(1, 3, *size)).shape[1])
        try:
            llava.describe_clip(path="acme/encoder", revision="none")
        except Exception as error:
            print(type(error).__name__)
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.splitlines() == ["(28, 28) 16", "(42, 42) 36", "(42, 42) 36", "ModelError"], result.stderr


def test_a_processor_without_resizing_is_refused(clip: Path) -> None:
    edit_json(clip / "preprocessor_config.json", do_resize=False)
    with pytest.raises(ModelError, match="no do_resize"):
        llava.describe_clip(path=clip)


def test_pictures_of_different_shapes_are_refused_unless_padded(clip: Path) -> None:
    edit_json(clip / "preprocessor_config.json", do_center_crop=False)
    with pytest.raises(ModelError, match="pad_to_square=True"):
        llava.describe_clip(path=clip, pad_to_square=False)
    assert llava.describe_clip(path=clip).num_patches == 16


def test_a_missing_weight_is_an_error(clip: Path) -> None:
    name = "encoder.layers.1.mlp.fc1.weight"
    edit_weights(clip, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=rf"1 of its weights are missing, such as {name}"):
        llava.build_clip(path=clip)
    assert llava.build_clip(path=clip, select_layer=1)  # that block is not built here


def test_a_weight_of_another_shape_is_an_error(clip: Path) -> None:
    edit_json(clip / "config.json", intermediate_size=48)
    with pytest.raises(ModelError, match="cannot be loaded"):
        llava.build_clip(path=clip)


def test_a_weight_without_a_place_is_an_error(clip: Path) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["encoder.layers.0.mlp.gate.weight"] = torch.zeros(2)

    edit_weights(clip, add)
    with pytest.raises(ModelError, match=r"1 of its weights have no place in a CLIPVisionModel.*mlp\.gate"):
        llava.build_clip(path=clip)


def test_a_weight_without_a_place_is_an_error_in_a_checkpoint_with_a_head_too(tmp_path: Path) -> None:
    save_model(tmp_path, "vit")
    ViTForImageClassification(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    hf_vision.build(path=tmp_path)  # the head itself is no reason
    edit_weights(tmp_path, lambda weights: weights.update({"vit.encoder.layer.0.gate.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"1 of its weights have no place in a ViTModel.*gate\.weight"):
        hf_vision.build(path=tmp_path)


def test_a_truncated_weight_file_is_an_error(clip: Path) -> None:
    file = clip / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        llava.build_clip(path=clip)


def test_building_is_silent_and_leaves_the_logging_and_the_random_state_alone(
    clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, state = logging.get_verbosity(), torch.get_rng_state()
    for verbosity in (logging.WARNING, logging.CRITICAL):
        logging.set_verbosity(verbosity)
        try:
            capfd.readouterr()
            llava.build_clip(path=clip, select_layer=1)
            assert capfd.readouterr() == ("", "")
            assert logging.get_verbosity() == verbosity
            assert logging.is_progress_bar_enabled()
        finally:
            logging.set_verbosity(before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_leaves_the_gradients_unchanged(clip: Path, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        encoder: Any = llava.build_clip(path=clip).train()
        if checkpointing:
            encoder.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        encoder(pixels).square().mean().backward()
        return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) > 30  # all but the norm behind the selected layer
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)

"""What an encoder or a projector promises is held against one picture before anything is trained."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from mmft import hookimpl
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.config.check import find_problems
from mmft.data.shape import describe_model
from mmft.errors import DataError, ModelError
from mmft.hub import encoder_options
from mmft.images import ImageTransform
from mmft.modeling.build import build_model
from mmft.modeling.llava import masked_image_scatter
from mmft.plan.skeleton import build_skeleton
from mmft.plugins import load_plugins
from mmft.specs import ProjectorSpec, VisionEncoderSpec, VisionInfo, same_number

TRANSFORM = ImageTransform(resize=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
INFO = VisionInfo(hidden_size=12, num_patches=4, transform=TRANSFORM)
ENCODER = f"model.vision.encoder: vision encoder 'acme_vit' of plugin {__name__!r}: "
PROJECTOR = f"model.vision.projector: projector 'acme_mlp' of plugin {__name__!r}: "


class Encoder(nn.Module):
    """Four patches of 8 x 8 pixels, with what a proof must not disturb: a batch norm, a dropout, and a draw."""

    def __init__(self, width: int = 12, *, more: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, width, 8, 8), nn.BatchNorm1d(width), nn.Dropout(0.5)
        self.more, self.scale = more, scale

    def forward(self, pixel_values):
        features = self.drop(self.norm(self.conv(pixel_values).flatten(2)).transpose(1, 2))
        torch.rand(1)  # as an encoder that samples does, in eval mode too
        return self.scale * torch.cat([features, features[:, : self.more]], dim=1)


def spoilt(width_in: int, width_out: int) -> nn.Module:
    projector = nn.Linear(width_in, width_out)
    nn.init.constant_(projector.bias, float("inf"))
    return projector


def raises(*_):
    raise KeyError("weights")


def plugins_with(
    *, encoder=Encoder, projector=nn.Linear, info=INFO, describe=None, num_tokens=same_number, hub_option=None
):
    """Every plugin here and one more, that offers an encoder and a projector."""
    module = ModuleType(__name__)

    def mmft_vision_encoders():
        named = {"name": "acme_vit", "hub_option": hub_option}
        return [VisionEncoderSpec(describe=describe or (lambda: info), build=encoder, **named)]

    def mmft_projectors():
        return [ProjectorSpec(name="acme_mlp", build=projector, num_tokens=num_tokens)]

    module.mmft_vision_encoders, module.mmft_projectors = hookimpl(mmft_vision_encoders), hookimpl(mmft_projectors)
    return load_plugins([module])


def model_of(llm, **vision) -> Model:
    return Model(llm=LLM(path=str(llm)), vision=Vision(encoder=use("acme_vit"), projector=use("acme_mlp"), **vision))


def built(llm, plugins, *, info=INFO, **vision):
    return build_model(
        model_of(llm, **vision), plugins, info=info, image_id=5, dtype=torch.float32, device=torch.device("cpu")
    )


BROKEN = {
    "width of a projector": (
        {"projector": lambda i, o: nn.Linear(i, o + 1)},
        (
            f"{PROJECTOR}its module made [1, 4, 33] of one picture, expected [1, 4, 32]: build was asked for 32 "
            "features, and num_tokens says 4; correct num_tokens or the module"
        ),
    ),
    "number of tokens": (
        {"num_tokens": lambda num_patches: num_patches + 1},
        (
            f"{PROJECTOR}its module made [1, 4, 32] of one picture, expected [1, 5, 32]: build was asked for 32 "
            "features, and num_tokens says 5; "
        ),
    ),
    "number of patches, hidden by the projector": (
        {"encoder": lambda: Encoder(more=1), "projector": lambda i, o: nn.AdaptiveAvgPool2d((4, o))},
        (
            f"{ENCODER}its module made [1, 5, 12] of one picture, expected [1, 4, 12]: describe says num_patches=4 and "
            "hidden_size=12; correct describe or the module"
        ),
    ),
    "width of an encoder": ({"encoder": lambda: Encoder(20)}, "made [1, 4, 20] of one picture, expected [1, 4, 12]"),
    "finite features": (
        {"encoder": lambda: Encoder(scale=float("nan"))},
        f"{ENCODER}its module made numbers of one picture that are not finite; correct its forward",
    ),
    "finite weights": (
        {"projector": spoilt},
        f"{PROJECTOR}its module made numbers of one picture that are not finite, its weight bias is not either; ",
    ),
    "module": ({"encoder": lambda: raises}, f"{ENCODER}build gave a function, expected a torch.nn.Module"),
    "build": ({"projector": raises}, f"{PROJECTOR}build failed: KeyError: 'weights' (test_picture_proof.py:"),
    "forward": (
        {"encoder": lambda: nn.Conv2d(3, 12, 32)},
        f"{ENCODER}its module, on one picture of [1, 3, 16, 16], failed: RuntimeError: ",
    ),
    "tensor": (
        {"projector": nn.LSTM},
        f"{PROJECTOR}its module made a tuple of one picture, expected a tensor",
    ),
    "transform": (
        {"info": replace(INFO, transform=raises)},
        f"{ENCODER}the transform of describe, on a picture of 64 x 64, failed: KeyError: 'weights' (test_picture_proof",
    ),
    "transformed shape": (
        {"info": replace(INFO, transform=lambda image: torch.zeros(1, 3, 16, 16))},
        f"{ENCODER}the transform of describe made float32[1, 3, 16, 16] of a picture, expected float32[3, H, W]",
    ),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_a_part_that_breaks_its_promise_is_refused_before_training_and_named(promise, tiny_llm_path):
    changes, told = BROKEN[promise]
    for trains in (False, True):
        with pytest.raises(ModelError) as caught:
            built(tiny_llm_path, plugins_with(**changes), info=changes.get("info", INFO), trainable=trains)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_proof_changes_neither_random_state_nor_modes_nor_statistics(tiny_llm_path):
    torch.manual_seed(7)
    encoder, projector = Encoder(), nn.Sequential(nn.Linear(12, 32), nn.Dropout(0.5).eval())
    before, seed = {k: v.clone() for k, v in encoder.state_dict().items()}, torch.get_rng_state()
    modes = [module.training for module in (*encoder.modules(), *projector.modules())]
    model = built(tiny_llm_path, plugins_with(encoder=lambda: encoder, projector=lambda i, o: projector))
    assert torch.equal(torch.get_rng_state(), seed)
    assert modes == [module.training for module in (*encoder.modules(), *projector.modules())]
    assert all(torch.equal(value, before[key]) for key, value in model.vision.state_dict().items())


def test_a_module_tells_which_plugin_made_it(tiny_llm_path):
    made_by = built(tiny_llm_path, plugins_with()).made_by
    assert made_by == {"vision": f"vision encoder 'acme_vit' of plugin {__name__!r}",
                       "projector": f"projector 'acme_mlp' of plugin {__name__!r}"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"describe": lambda: {"hidden_size": 12}}, "describe gave a dict, expected a VisionInfo"),
        ({"describe": raises}, "describe failed: KeyError: 'weights' (test_picture_proof.py:"),
        ({"num_tokens": raises}, "num_tokens failed: KeyError: 'weights' (test_picture_proof.py:"),
        ({"num_tokens": lambda num_patches: 2.5}, "num_tokens gave 2.5, expected a whole number above 0"),
        ({"info": replace(INFO, num_patches="4")}, "describe says num_patches='4', expected a whole number above 0"),
    ],
)
def test_a_description_that_is_none_is_one_line_that_names_plugin_and_function(changes, told, tiny_llm_path):
    with pytest.raises(ModelError) as caught:
        describe_model(model_of(tiny_llm_path), plugins_with(**changes))
    assert told in str(caught.value) and repr(__name__) in str(caught.value)
    assert "\n" not in str(caught.value)


def config_of(model: Model) -> TrainConfig:
    dataset = Dataset(source=use("json", path="data.json"), data_map="llava")
    data = Data(datasets=(dataset,), chat_template="vicuna", max_length=128)
    return TrainConfig(model=model, data=data, optim=Optim(lr=1e-3), runtime=Runtime(output_dir="run"))


@pytest.mark.parametrize("describe", [raises, lambda: {"hidden_size": 12}])
def test_a_description_that_is_none_is_a_problem_of_the_config_and_no_traceback(describe, tiny_llm_path):
    found = [str(one) for one in find_problems(config_of(model_of(tiny_llm_path)), plugins_with(describe=describe))]
    assert any(
        one.startswith(f"model.vision: vision encoder 'acme_vit' of plugin {__name__!r}: describe ") for one in found
    )


def own_weights(*, path: str) -> VisionInfo:
    """Reads a file of its own."""
    Path(path).read_bytes()
    return INFO


def with_path(*, path: str) -> nn.Module:
    return Encoder()


def test_an_option_called_path_is_the_plugins_own_unless_its_spec_says_that_it_is_a_hub_folder(tmp_path, tiny_llm_path):
    file = tmp_path / "acme.pth"
    file.write_bytes(b"")

    def told(plugins, path, hub="huggingface"):
        vision = Vision(encoder=use("acme_vit", path=str(path)), projector=use("acme_mlp"))
        model = Model(llm=LLM(path=str(tiny_llm_path)), vision=vision, hub=hub)
        problems = [str(one) for one in find_problems(config_of(model), plugins) if "vision" in one.where]
        return problems, encoder_options(vision.encoder, plugins, hub) if not problems else None

    own = plugins_with(encoder=with_path, describe=own_weights)
    assert told(own, file) == ([], {"path": str(file)})
    assert told(own, file, "modelscope") == ([], {"path": str(file)})  # no name to download
    ((problem,), _) = told(own, "weights/acme.pth")  # it has the form of a hub name, and is described all the same
    assert "describe failed: FileNotFoundError: " in problem
    hub = plugins_with(encoder=with_path, describe=own_weights, hub_option="path")
    ((problem,), _) = told(hub, file)
    assert problem.startswith(f"model.vision.encoder.path: {file} does not exist; give a folder saved by")


def test_the_plan_says_why_it_does_not_count_an_encoder_that_names_no_hub_folder(tiny_llm_path):
    config = config_of(model_of(tiny_llm_path))
    skeleton = build_skeleton(
        config, plugins_with(), info=INFO, image_id=5, dtype=torch.float32, target="cpu"
    )  # fmt: skip
    (note,) = skeleton.notes
    assert "acme_vit is not counted" in note and "names no option that takes a folder saved by save_pretrained" in note


def test_the_shipped_encoders_say_where_they_take_a_hub_folder(plugins):
    assert {spec.name: spec.hub_option for spec in plugins.vision_encoders} == dict.fromkeys(
        ("clip", "dinov2", "siglip", "vit"), "path"
    )


def test_features_of_another_width_are_never_scattered_over_the_embeddings():
    embeds, ids = torch.zeros(1, 6, 4), torch.tensor([[9, 9, 9, 9, 1, 1]])
    with pytest.raises(DataError, match="image features of width 5, the embeddings have 4"):
        masked_image_scatter(embeds, ids, torch.ones(1, 4, 5), 9)
    assert masked_image_scatter(embeds, ids, torch.ones(1, 4, 4), 9).sum() == 16

"""`mmft check`: each thing that can be known to be wrong without reading a weight is found, all at once."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Prompt, Runtime, TrainConfig, Vision, override, use
from mmft.config.check import check_config, find_problems
from mmft.errors import ConfigError, PluginError
from mmft.plugins import Plugins, load_plugins

Change = Callable[[Path], dict[str, Any]]


@pytest.fixture
def config(tmp_path: Path, tiny_llm_path: Path, tiny_clip_path: Path) -> TrainConfig:
    """A whole config with nothing wrong."""
    (tmp_path / "data.json").write_text(json.dumps([]), "utf-8")
    (tmp_path / "images").mkdir()
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", "utf-8")
    (tmp_path / "projector.safetensors").write_bytes(b"")
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), lora=Lora(r=4), adapter=tmp_path / "adapter", quantization="nf4"),
            vision=Vision(
                encoder=use("clip", path=str(tiny_clip_path)),
                projector=use("mlp2x_gelu"),
                projector_weights=tmp_path / "projector.safetensors",
            ),
        ),
        data=Data(
            datasets=(
                Dataset(
                    source=use("json", path=str(tmp_path / "data.json")),
                    data_map="llava",
                    image_folder=tmp_path / "images",
                ),
            ),
            chat_template="vicuna",
            max_length=128,
        ),
        optim=Optim(lr=1e-4, projector_lr=1e-3),
        runtime=Runtime(
            output_dir=tmp_path / "run", sample_steps=5, samples=(Prompt(text="?", images=(tmp_path / "a.png",)),)
        ),
    )


def found(config: TrainConfig, plugins: Plugins) -> list[str]:
    return [str(problem) for problem in find_problems(config, plugins)]


def test_a_config_with_nothing_wrong_has_no_problem(config: TrainConfig, plugins: Plugins) -> None:
    assert found(config, plugins) == []
    check_config(config, plugins)


def test_a_hub_id_is_left_to_the_hub(config: TrainConfig, plugins: Plugins) -> None:
    ids = {"model.llm.path": "lmsys/vicuna-7b-v1.5", "model.vision.encoder.path": "openai/clip-vit-large-patch14-336"}
    assert found(override(config, ids), plugins) == []


# One wrong value each: what is changed, and the one problem it must give.
WRONG: dict[str, tuple[Change, str]] = {
    "the LLM's path is not there": (
        lambda tmp: {"model.llm.path": str(tmp / "nowhere")},
        r"model\.llm\.path: \S+nowhere does not exist; give a folder saved by save_pretrained, or a hub id",
    ),
    "a relative path is not there": (
        lambda tmp: {"model.llm.path": "./nowhere"},
        r"model\.llm\.path: \./nowhere does not exist; .*",
    ),
    "the LLM's folder is no model": (
        lambda tmp: {"model.llm.path": str(tmp / "empty")},
        r"model\.llm\.path: \S+empty has no config\.json; .*",
    ),
    "the whole LLM in four bits": (
        lambda tmp: {"model.llm.lora": None, "model.llm.adapter": None, "model.llm.trainable": True},
        r"model\.llm\.trainable: a model in nf4 cannot be trained whole; set model\.llm\.lora, or .*",
    ),
    "the whole LLM and LoRA": (
        lambda tmp: {"model.llm.trainable": True, "model.llm.quantization": "none"},
        r"model\.llm\.trainable: the whole model and a LoRA adapter cannot both train; drop one of them",
    ),
    "an adapter without LoRA": (
        lambda tmp: {"model.llm.lora": None},
        r"model\.llm\.adapter: an adapter to start from needs model\.llm\.lora; .*",
    ),
    "an adapter folder that is none": (
        lambda tmp: {"model.llm.adapter": tmp / "empty"},
        r"model\.llm\.adapter: \S+empty has no adapter_config\.json; give a PEFT adapter folder",
    ),
    "an unknown encoder": (
        lambda tmp: {"model.vision.encoder.use": "clipp"},
        r"model\.vision\.encoder: no vision encoder named 'clipp'; did you mean 'clip'\?; available: clip, .*",
    ),
    "an encoder's misspelt option": (
        lambda tmp: {"model.vision.encoder.selct_layer": -2},
        (
            r"model\.vision\.encoder: vision encoder 'clip': got an unexpected keyword argument 'selct_layer'; "
            r"options: path, select_layer, pad_to_square, image_size, revision"
        ),
    ),
    "an encoder without its path": (
        lambda tmp: {"model.vision.encoder": "clip"},
        r"model\.vision\.encoder: vision encoder 'clip': missing a required argument: 'path'; options: path, .*",
    ),
    "an encoder's path that is not there": (
        lambda tmp: {"model.vision.encoder.path": str(tmp / "nowhere")},
        r"model\.vision\.encoder\.path: \S+nowhere does not exist; .*",
    ),
    "an encoder's folder that is none": (
        lambda tmp: {"model.vision.encoder.path": str(tmp / "empty")},
        r"model\.vision\.encoder\.path: \S+empty has no config\.json; .*",
    ),
    "a layer the encoder does not have": (
        lambda tmp: {"model.vision.encoder.select_layer": -9},
        r"model\.vision: .*select_layer.*",
    ),
    "an unknown projector": (
        lambda tmp: {"model.vision.projector": "liner"},
        r"model\.vision\.projector: no projector named 'liner'; did you mean 'linear'\?; .*",
    ),
    "a projector's unknown option": (
        lambda tmp: {"model.vision.projector.depth": 3},
        r"model\.vision\.projector: projector 'mlp2x_gelu': .*'depth'; options: init_std",
    ),
    "a projector that does not fit the patches": (
        lambda tmp: {"model.vision.projector": {"use": "pixel_shuffle", "scale": 3}},
        r"model\.vision: pixel_shuffle: a grid of 4 x 4 patches does not divide by scale=3; .*",
    ),
    "an image that fills max_length": (
        lambda tmp: {"data.max_length": 16},
        r"data\.max_length: 16 tokens leave no room beside an image of 16 tokens; .*",
    ),
    "projector weights that are not there": (
        lambda tmp: {"model.vision.projector_weights": tmp / "no.safetensors"},
        r"model\.vision\.projector_weights: \S+no\.safetensors does not exist; run the pretrain stage first, .*",
    ),
    "the whole encoder and LoRA": (
        lambda tmp: {"model.vision.trainable": True, "model.vision.lora.r": 4},
        r"model\.vision\.trainable: the whole encoder and a LoRA adapter cannot both train; drop one",
    ),
    "cached features of an encoder that trains": (
        lambda tmp: {"model.vision.feature_cache": tmp, "model.vision.lora.r": 4},
        r"model\.vision\.feature_cache: features of an encoder that trains cannot be cached; drop one",
    ),
    "an unknown chat template": (
        lambda tmp: {"data.chat_template": "vicunna"},
        r"data\.chat_template: no chat template named 'vicunna'; did you mean 'vicuna'\?; .*",
    ),
    "an unknown source": (
        lambda tmp: {"data.datasets.0.source.use": "jsom"},
        r"data\.datasets\.0\.source: no data source named 'jsom'; did you mean 'json'\?; .*",
    ),
    "a source's unknown option": (
        lambda tmp: {"data.datasets.0.source.encoding": "latin-1"},
        r"data\.datasets\.0\.source: data source 'json': .*'encoding'; options: path, field",
    ),
    "a source's file that is not there": (
        lambda tmp: {"data.datasets.0.source.path": str(tmp / "no.json")},
        r"data\.datasets\.0\.source: \S+no\.json does not exist",
    ),
    "a source with no files": (
        lambda tmp: {"data.datasets.0.source.path": []},
        r"data\.datasets\.0\.source: path: an empty list; give at least one file",
    ),
    "a source's path of the wrong type": (
        lambda tmp: {"data.datasets.0.source.path": 7},
        r"data\.datasets\.0\.source: .*int.*",
    ),
    "an unknown data map": (
        lambda tmp: {"data.datasets.0.data_map": "lava"},
        r"data\.datasets\.0\.data_map: no data map named 'lava'; did you mean 'llava'\?; .*",
    ),
    "an image folder that is none": (
        lambda tmp: {"data.datasets.0.image_folder": tmp / "no"},
        r"data\.datasets\.0\.image_folder: \S+no is not a folder",
    ),
    "nothing to train": (
        lambda tmp: {
            "model.llm.lora": None,
            "model.llm.adapter": None,
            "optim.projector_lr": None,
            "model.vision.projector_trainable": False,
        },
        r"model: nothing is trained; set model\.llm\.lora, model\.llm\.trainable or model\.vision",
    ),
    "a learning rate for a projector that is frozen": (
        lambda tmp: {"model.vision.projector_trainable": False},
        r"optim\.projector_lr: there is no projector that trains; drop it",
    ),
    "a learning rate for a frozen encoder": (
        lambda tmp: {"optim.vision_lr": 1e-5},
        r"optim\.vision_lr: the vision encoder does not train; set model\.vision\.lora or drop it",
    ),
    "packing and grouping by modality": (
        lambda tmp: {"data.packing": True, "data.group_by_modality": True},
        r"data\.packing: packed rows are full already; drop group_by_modality and group_by_length",
    ),
    "packing and grouping by length": (
        lambda tmp: {"data.packing": True, "data.group_by_length": True},
        r"data\.packing: packed rows are full already; .*",
    ),
    "pictures for a text model": (
        lambda tmp: {"model.vision": None, "optim.projector_lr": None},
        r"runtime\.samples\.0\.images: the model has no vision encoder; set model\.vision or drop the images",
    ),
    "a picture that is not there": (
        lambda tmp: {"runtime.samples.0.images": (tmp / "no.png",)},
        r"runtime\.samples\.0\.images: \S+no\.png does not exist",
    ),
    "samples that ask nothing": (
        lambda tmp: {"runtime.samples": ()},
        r"runtime\.sample_steps: there is nothing to ask; give runtime\.samples",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_one_mistake_gives_its_one_problem(mistake: str, config: TrainConfig, plugins: Plugins, tmp_path: Path) -> None:
    change, message = WRONG[mistake]
    (problem,) = found(override(config, change(tmp_path)), plugins)
    assert re.fullmatch(message, problem), problem


@pytest.mark.parametrize(
    ("package", "change", "message"),
    [
        ("bitsandbytes", {}, "model.llm.quantization: nf4 needs bitsandbytes; pip install bitsandbytes"),
        (
            "flash_attn",
            {"model.llm.attention": "flash_attention_2"},
            "model.llm.attention: flash_attention_2 needs flash-attn; pip install flash-attn",
        ),
        ("wandb", {"runtime.report_to": ("wandb",)}, "runtime.report_to: wandb is not installed; pip install wandb"),
    ],
)
def test_a_package_that_is_needed_and_missing_is_one_line_with_its_install(
    package: str,
    change: dict[str, Any],
    message: str,
    config: TrainConfig,
    plugins: Plugins,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python itself marks what cannot be imported
    assert found(override(config, change), plugins) == [message]


def test_an_optimizer_transformers_does_not_have_is_found(config: TrainConfig, plugins: Plugins) -> None:
    (problem,) = found(override(config, {"optim.optimizer": "adamw_trch"}), plugins)
    assert problem.startswith("optim.optimizer: ")


def test_all_problems_come_at_once_in_the_order_of_the_parts(
    config: TrainConfig, plugins: Plugins, tmp_path: Path
) -> None:
    wrong = override(
        config,
        {
            "runtime.samples.0.images": (tmp_path / "no.png",),
            "data.chat_template": "vicunna",
            "model.llm.path": str(tmp_path / "nowhere"),
            "optim.vision_lr": 1e-5,
        },
    )
    with pytest.raises(ConfigError) as caught:
        check_config(wrong, plugins)
    parts = [problem.where.split(".")[0] for problem in caught.value.problems]
    assert parts == ["model", "data", "optim", "runtime"]
    assert str(caught.value).startswith("4 problems in the config:\n  - model.llm.path: ")


CHECK = """
from mmft import Problem, hookimpl

@hookimpl
def mmft_check_config(config, plugins):
    BODY
"""


def test_a_plugin_takes_part_in_the_check(install: Callable[..., Path], config: TrainConfig) -> None:
    body = "yield Problem('optim.lr', f'{config.optim.lr} with {len(plugins.projectors.names())} projectors', 'why?')"
    install("acme-mmft", "0.2.0", {"acme": "acme_mod"}, acme_mod=CHECK.replace("BODY", body))
    assert found(config, load_plugins()) == ["optim.lr: 0.0001 with 6 projectors; why?"]


def test_a_plugin_whose_check_fails_is_named(install: Callable[..., Path], config: TrainConfig) -> None:
    install("acme-mmft", "0.2.0", {"acme": "acme_mod"}, acme_mod=CHECK.replace("BODY", "return config.nothing"))
    with pytest.raises(PluginError, match=r"^plugin 'acme' from acme-mmft 0\.2\.0, mmft_check_config: AttributeError"):
        found(config, load_plugins())

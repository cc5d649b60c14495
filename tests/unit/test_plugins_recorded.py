"""A trained model and the plugins of today: it says whose parts it has, and opens with theirs."""

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmft.config import Model, TrainConfig
from mmft.convert.parts import load_parts
from mmft.data.shape import describe_model
from mmft.errors import AmbiguousName, UnknownName
from mmft.inference import load_assistant
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import Manifest, as_trained, read_manifest, save_parts, used_plugins, write_manifest
from mmft.plugins import Plugins, load_plugins, named_module

Install = Callable[..., Path]

PARTS = """
from mmft import ProjectorSpec, VisionEncoderSpec, VisionInfo, hookimpl
from mmft.images import ImageTransform

def describe():
    transform = ImageTransform(resize=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return VisionInfo(hidden_size=3 * 8 * 8, num_patches=4, transform=transform)

def build():
    from torch import nn

    class Patches(nn.Module):
        def forward(self, pixels):
            return nn.functional.unfold(pixels, kernel_size=8, stride=8).transpose(1, 2)

    return Patches()

def project(in_features, out_features):
    from torch import nn
    return nn.Linear(in_features, out_features)

@hookimpl
def mmft_vision_encoders():
    return [VisionEncoderSpec(name="acme_vit", describe=describe, build=build)]

@hookimpl
def mmft_projectors():
    return [ProjectorSpec(name="acme_linear", build=project)]
"""
OTHER = """
from mmft import ProjectorSpec, hookimpl

def project(in_features, out_features):
    from torch import nn
    return nn.Sequential(nn.Linear(in_features, out_features), nn.Linear(out_features, out_features))

@hookimpl
def mmft_projectors():
    return [ProjectorSpec(name="acme_linear", build=project)]
"""


def config(llm: Path) -> TrainConfig:
    tree = {
        "model": {
            "llm": {"path": str(llm)},
            "vision": {"encoder": {"name": "acme_vit"}, "projector": {"name": "acme_linear"}},
        },
        "data": {
            "chat_template": "chatml",
            "max_length": 128,
            "datasets": [{"source": {"name": "jsonl", "options": {"path": "x.jsonl"}}, "data_map": "llava"}],
        },
        "optim": {"lr": 0.001, "epochs": 1},
        "runtime": {"output_dir": "unused"},
    }
    return TrainConfig.model_validate(tree)


def record(folder: Path, llm: Path, plugins: Plugins) -> Manifest:
    """A model folder, as training writes it, of a model that was not trained."""
    chosen = config(llm)
    model: Model = chosen.model
    shape = describe_model(model, plugins)
    built = build_model(
        model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    save_parts(folder, built, shape.tokenizer.hf)
    write_manifest(folder, chosen, plugins, "fp32")
    return read_manifest(folder)


def opened(folder: Path, plugins: Plugins) -> Any:
    return load_assistant(folder, plugins, device=torch.device("cpu")).model


@pytest.fixture
def file_plugin(tmp_path: Path, install: Install) -> Callable[[str, str], ModuleType]:
    """`file_plugin("single", source)`: a module as `--plugin single.py` gives it."""

    def file_plugin(name: str, source: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(source, "utf-8")
        return named_module(str(path))

    return file_plugin


def distribution(install: Install, version: str, source: str = PARTS, name: str = "acme") -> Plugins:
    module = f"{name}_mod"
    install(f"mmft-{name}", version, {name: module}, **{module: source})
    importlib.invalidate_caches()
    return load_plugins()


def a_manifest(plugins: Plugins) -> Manifest:
    """Of a model that was trained with these plugins."""
    chosen = config(Path("llm"))
    return Manifest(chosen.model, "chatml", "fp32", {}, used_plugins(chosen, plugins), {})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


def test_a_model_of_a_file_opens_with_that_file_whoever_else_offers_the_name_and_says_which_file_is_missing(
    tmp_path: Path, tiny_llm_path: Path, install: Install, file_plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    single = file_plugin("single", PARTS)
    folder = tmp_path / "model"
    manifest = record(folder, tiny_llm_path, load_plugins([single]))
    owner = manifest.plugins["projector acme_linear"]
    assert owner.startswith("single sha256:") and len(owner) == len("single sha256:") + 16

    clash = distribution(install, "2.0", OTHER, "clash")
    with pytest.raises(AmbiguousName):
        load_plugins([single]).projectors.get("acme_linear")
    projector = opened(folder, load_plugins([single])).projector
    assert isinstance(projector, torch.nn.Linear) and warnings(caplog) == []
    parts = load_parts(folder, load_plugins([single]), dtype=None, device=torch.device("cpu"))  # as converters do
    assert isinstance(parts.projector, torch.nn.Linear)

    with pytest.raises(UnknownName) as caught:
        opened(folder, clash)
    assert str(caught.value).startswith(
        f"{folder}: no vision encoder named 'acme_vit': it was trained with that of {owner}, a file; give it again: "
        "mmft --plugin single.py ...; available: "
    )


def test_a_file_that_was_changed_since_is_one_warning(file_plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    manifest = a_manifest(load_plugins([file_plugin("single", PARTS)]))
    del sys.modules["single"]
    changed = load_plugins([file_plugin("single", PARTS + "\n# changed\n")])
    as_trained(Path("final"), manifest, changed)
    was, now = manifest.plugins["projector acme_linear"], changed.projectors.owner("acme_linear").identity
    (said,) = warnings(caplog)
    assert said == (
        f"final was trained with other plugins: vision encoder acme_vit, projector acme_linear with {was}, here is "
        f"{now}; it may answer otherwise than it did"
    )
    assert was != now


def test_another_version_of_a_distribution_is_one_warning_and_the_same_one_none(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    plugins = distribution(install, "0.2.0")
    manifest = a_manifest(plugins)
    assert manifest.plugins["vision encoder acme_vit"] == "mmft-acme 0.2.0"
    as_trained(Path("final"), manifest, plugins)
    assert warnings(caplog) == []
    older = replace(manifest, plugins={key: of.replace("0.2.0", "0.1.0") for key, of in manifest.plugins.items()})
    known = as_trained(Path("final"), older, plugins)
    assert as_trained(Path("final"), older, known) is known  # said once
    (said,) = warnings(caplog)
    assert "vision encoder acme_vit, projector acme_linear with mmft-acme 0.1.0, here is mmft-acme 0.2.0" in said


def test_a_distribution_that_is_not_installed_is_named_with_its_version(install: Install, plugins: Plugins) -> None:
    manifest = a_manifest(distribution(install, "0.1.0"))
    known = as_trained(Path("final"), manifest, plugins)
    with pytest.raises(
        UnknownName, match=r"'acme_vit': it was trained with that of mmft-acme 0\.1\.0, which is not here; "
    ):
        known.vision_encoders.get("acme_vit")


def test_a_distribution_that_no_longer_offers_the_name_is_named_with_both_versions(install: Install) -> None:
    trained = {"vision encoder acme_vit": "mmft-acme 0.0.1"}
    known = distribution(install, "0.1.0", OTHER).as_trained(trained)
    with pytest.raises(UnknownName, match=r"of mmft-acme 0\.0\.1; mmft-acme 0\.1\.0, which is here, does not offer it"):
        known.vision_encoders.get("acme_vit")


def test_where_neither_owner_is_the_recorded_one_the_error_says_whose_it_was(install: Install) -> None:
    distribution(install, "0.1.0")
    known = distribution(install, "2.0", OTHER, "clash").as_trained({"projector acme_linear": "gone-mmft 3.0"})
    with pytest.raises(AmbiguousName, match=r"clash/acme_linear; it was trained with that of gone-mmft 3\.0$"):
        known.projectors.get("acme_linear")


def test_another_version_of_mmft_itself_and_a_file_recorded_without_a_digest_are_no_news(
    plugins: Plugins, file_plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    known = load_plugins([file_plugin("single", PARTS)])
    recorded = {"chat template chatml": "mmft 0.0.1", "projector acme_linear": "single"}
    manifest = Manifest(config(Path("llm")).model, "chatml", "fp32", {}, recorded, {})
    as_trained(Path("final"), manifest, known)
    assert warnings(caplog) == []


def test_the_digest_of_a_package_is_of_all_its_modules(tmp_path: Path, install: Install) -> None:
    for name, text in (("__init__", PARTS), ("inner", "A = 1\n")):
        (tmp_path / "boxed").mkdir(exist_ok=True)
        (tmp_path / "boxed" / f"{name}.py").write_text(text, "utf-8")
    module = named_module(str(tmp_path / "boxed" / "__init__.py"))
    digests = []
    for text in ("A = 1\n", "A = 2\n"):
        (tmp_path / "boxed" / "inner.py").write_text(text, "utf-8")
        digests.append(load_plugins([module]).projectors.owner("acme_linear").digest)
    assert digests[0] != digests[1]

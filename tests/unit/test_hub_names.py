"""Names of models: folders need no hub, a cache needs no network, and what is missing is one line."""

import importlib.util
import shutil
import socket
from pathlib import Path

import pytest
import torch

from mmft.config import LLM, Model, Vision, use
from mmft.data.shape import describe_model
from mmft.errors import ModelError
from mmft.hub import looks_like_path, model_folder, named_from, seen_from
from mmft.modeling.build import build_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(cache: Path, name: str, folder: Path) -> None:
    """A folder of the Hugging Face cache as a download leaves it: refs, and a snapshot that links to blobs."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, repo / "blobs" / f"{number:040d}")
        (repo / "snapshots" / COMMIT / file.name).symlink_to(Path("../../blobs") / f"{number:040d}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, in offline mode."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(folder))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Who is called over the network; nobody answers."""
    called = []

    def refuse(*arguments, **options):
        called.append(arguments[0])
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: refuse(address))
    return called


def model(llm, encoder, **options) -> Model:
    return Model(
        llm=LLM(path=str(llm)),
        vision=Vision(encoder=use("clip", path=str(encoder)), projector=use("mlp2x_gelu")),
        **options,
    )


def build(chosen, plugins):
    shape = describe_model(chosen, plugins)
    return build_model(
        chosen, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


def test_names_in_the_hugging_face_cache_need_no_network(cache, calls, plugins, tiny_llm_path, tiny_clip_path):
    snapshot(cache, "acme/tiny-llm", tiny_llm_path)
    snapshot(cache, "acme/tiny-clip", tiny_clip_path)
    named, local = (
        build(model("acme/tiny-llm", "acme/tiny-clip"), plugins),
        build(model(tiny_llm_path, tiny_clip_path), plugins),
    )
    ours, theirs = named.llm.state_dict(), local.llm.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert calls == []


def test_folders_cause_no_network_call_while_the_network_may_be_used(
    monkeypatch, calls, plugins, tiny_llm_path, tiny_clip_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    build(model(tiny_llm_path, tiny_clip_path), plugins)
    assert calls == []


def test_a_missing_name_in_offline_mode_is_one_line_with_both_causes(cache, plugins, tiny_clip_path):
    with pytest.raises(ModelError) as caught:
        describe_model(model("acme/no-such-model", tiny_clip_path), plugins)
    text = str(caught.value)
    assert text.startswith("model.llm.path: 'acme/no-such-model' is no folder and was not found on huggingface: ")
    assert "the name is wrong" in text
    assert "offline mode is on (HF_HUB_OFFLINE=1)" in text
    assert "\n" not in text


def test_a_missing_encoder_in_offline_mode_is_one_line_with_both_causes(cache, plugins, tiny_llm_path):
    with pytest.raises(ModelError) as caught:
        describe_model(model(tiny_llm_path, "acme/no-such-encoder"), plugins)
    text = str(caught.value)
    assert "acme/no-such-encoder" in text
    assert "the name is wrong" in text
    assert "offline mode" in text
    assert "\n" not in text


def test_what_looks_like_a_path_is_called_a_folder_that_does_not_exist(plugins, tiny_clip_path):
    with pytest.raises(ModelError, match=r"^model\.llm\.path: the folder \./models/no/such does not exist; "):
        describe_model(model("./models/no/such", tiny_clip_path), plugins)


def test_a_cached_model_without_weights_is_not_called_missing(cache, plugins, tiny_llm_path, tmp_path):
    shutil.copytree(tiny_llm_path, tmp_path / "llm")
    (tmp_path / "llm" / "model.safetensors").unlink()
    snapshot(cache, "acme/half", tmp_path / "llm")
    chosen = Model(llm=LLM(path="acme/half"))
    with pytest.raises(ModelError, match=r"^model\.llm\.path: cannot load acme/half: ") as caught:
        build(chosen, plugins)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt2", False), ("org/name", False), ("a/b/c", True), ("./a", True), ("~/a", True), ("/a", True)],
)
def test_a_hub_name_has_at_most_one_slash(name, path):
    assert looks_like_path(name) is path


def test_a_folder_needs_no_modelscope(tiny_llm_path):
    assert model_folder("x", tiny_llm_path, "modelscope") == str(tiny_llm_path)


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is not None, reason="modelscope is installed")
def test_modelscope_that_is_not_installed_is_one_line_with_the_command(plugins, tiny_clip_path):
    with pytest.raises(
        ModelError, match=r"^model\.llm\.path: .*No module named 'modelscope'; pip install 'mmft\[modelscope\]'$"
    ):
        describe_model(model("acme/tiny-llm", tiny_clip_path, hub="modelscope"), plugins)


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is None, reason="needs modelscope")
def test_names_in_the_modelscope_cache_need_no_network(
    cache, calls, monkeypatch, plugins, tmp_path, tiny_llm_path, tiny_clip_path
):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    for name, folder in (("tiny-llm", tiny_llm_path), ("tiny-clip", tiny_clip_path)):
        shutil.copytree(folder, tmp_path / "modelscope" / "models" / f"acme--{name}" / "snapshots" / "master")
    built = build(model("acme/tiny-llm", "acme/tiny-clip", hub="modelscope"), plugins)
    assert "tiny-llm" in str(built.causal_lm.config._name_or_path)
    assert calls == []
    with pytest.raises(ModelError, match=r"'acme/other' is no folder and was not found on modelscope: .*offline mode"):
        describe_model(model("acme/other", tiny_clip_path, hub="modelscope"), plugins)


def test_a_relative_path_of_a_trained_model_is_found_from_anywhere(tmp_path, monkeypatch):
    started, run = tmp_path / "project", tmp_path / "project" / "work_dirs" / "run" / "final"
    (started / "models" / "llm").mkdir(parents=True)
    run.mkdir(parents=True)
    encoder = use("clip", path="models/clip", select_layer=-2)  # is nowhere: a name of the hub
    model = Model(llm=LLM(path="models/llm"), vision=Vision(encoder=encoder, projector=use("mlp2x_gelu")))
    monkeypatch.chdir(started)
    assert seen_from(model, run) == model
    monkeypatch.chdir(tmp_path)
    found = seen_from(model, run)
    assert found.llm.path == str(started / "models" / "llm")
    assert found.vision == model.vision
    (started / "models" / "clip").mkdir()
    assert seen_from(model, run).vision.encoder.options == {
        "path": str(started / "models" / "clip"),
        "select_layer": -2,
    }
    (run / "llm").mkdir()
    (tmp_path / "llm").mkdir()  # of somebody else
    assert seen_from(Model(llm=LLM(path="./llm")), run).llm.path == str(run / "llm")
    assert seen_from(Model(llm=LLM(path="llm")), run).llm.path == "llm"


def test_a_model_that_is_written_elsewhere_names_its_parts_so_that_they_are_found(tmp_path, monkeypatch):
    started = tmp_path / "project"
    (started / "models" / "llm").mkdir(parents=True)
    within, elsewhere, shadowed = started / "work_dirs" / "run", tmp_path / "elsewhere", tmp_path / "other" / "run"
    (tmp_path / "other" / "models" / "llm").mkdir(parents=True)  # of the same name, and another model
    monkeypatch.chdir(started)
    model = Model(llm=LLM(path="models/llm"))
    assert named_from(model, within) == model
    for folder in (elsewhere, shadowed):
        assert named_from(model, folder).llm.path == str(started / "models" / "llm")
    assert named_from(Model(llm=LLM(path="owner/name")), elsewhere).llm.path == "owner/name"
    monkeypatch.chdir(tmp_path)
    for folder in (within, elsewhere, shadowed):
        monkeypatch.chdir(started)
        named = named_from(model, folder)
        monkeypatch.chdir(tmp_path)
        assert seen_from(named, folder).llm.path == str(started / "models" / "llm")

"""`mmft convert pth_to_hf`: checkpoints of XTuner, as one file, and our own."""

import functools
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from import_models import HistoryBuffer, adapted, same_as, save_pth, xtuner_config, xtuner_parts
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from mmft.cli.convert_import import pth_to_hf as command
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, override, use
from mmft.convert.importing.config import read_target, target_of
from mmft.convert.importing.files import read_deepspeed, read_tensors
from mmft.convert.importing.importers import pth_to_hf
from mmft.data.shape import describe_model
from mmft.errors import CheckpointError, ConfigError
from mmft.inference import load_assistant
from mmft.modeling.attention import for_generation
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import read_manifest, save_parts, write_manifest

CPU = torch.device("cpu")


@pytest.fixture
def mmengine(monkeypatch) -> None:
    """The place that MMEngine's class is pickled by; the reader has none."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(HistoryBuffer, "__module__", "mmengine.logging.history_buffer")
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer


def test_an_xtuner_pth_and_its_config_become_a_model_that_gives_the_same(
    tmp_path, plugins, tiny_llm_path, tiny_clip_path, mmengine
):
    config = xtuner_config(tmp_path, tiny_llm_path, tiny_clip_path, lora=True)
    *parts, state = xtuner_parts(tiny_llm_path, tiny_clip_path)
    save_pth(state, tmp_path / "iter_10.pth")
    arguments = [str(config), str(tmp_path / "iter_10.pth"), str(tmp_path / "out")]
    done = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    assert "is a model folder: mmft chat" in done.output
    same_as(tmp_path / "out", plugins, *parts)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.chat_template == "vicuna"
    assert (manifest.model.llm.lora.r, manifest.model.vision.lora.alpha) == (4, 6.0)
    assert manifest.model.vision.encoder.options["pad_to_square"] is True


def test_parts_that_xtuner_trained_whole_are_whole_here(tmp_path, plugins, tiny_llm_path, tiny_clip_path):
    torch.manual_seed(1)
    language, vision = (
        AutoModelForCausalLM.from_pretrained(tiny_llm_path),
        CLIPVisionModel.from_pretrained(tiny_clip_path),
    )
    projector = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    with torch.no_grad():
        for parameter in (*language.parameters(), *vision.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    state = {f"llm.{key}": value for key, value in language.state_dict().items()}
    # transformers of that time had one level more before the blocks
    state |= {f"visual_encoder.vision_model.{key}": value for key, value in vision.state_dict().items()}
    state |= {f"projector.model.{key}": value for key, value in projector.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "iter_10.pth")
    target = read_target(str(xtuner_config(tmp_path, tiny_llm_path, tiny_clip_path, lora=False)), plugins)
    lines = pth_to_hf(tmp_path / "iter_10.pth", tmp_path / "out", target=target, plugins=plugins)
    assert any(f'go on from it with path="{tmp_path / "out" / "llm"}"' in line for line in lines)
    same_as(tmp_path / "out", plugins, language, vision, projector)
    del state["llm.model.norm.weight"]
    torch.save({"state_dict": state}, tmp_path / "iter_20.pth")
    with pytest.raises(CheckpointError, match=r"its language model is not the config's: missing model\.norm\.weight"):
        pth_to_hf(tmp_path / "iter_20.pth", tmp_path / "less", target=target, plugins=plugins)


def test_a_text_run_of_xtuner_becomes_a_text_model(tmp_path, plugins, tiny_llm_path):
    language = adapted(AutoModelForCausalLM.from_pretrained(tiny_llm_path), 4, 8)
    state = {f"llm.{key}": value for key, value in language.state_dict().items() if "lora_" in key}
    torch.save({"state_dict": state}, tmp_path / "iter_10.pth")
    config = TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path), lora=Lora(r=4, alpha=8))),
        data=Data(datasets=(Dataset(source=use("json", path="x.json"), data_map="llava"),), max_length=64),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=Path("out"), precision="fp32"),
    )
    pth_to_hf(tmp_path / "iter_10.pth", tmp_path / "out", target=target_of(config), plugins=plugins)
    assistant, ids = load_assistant(tmp_path / "out", plugins, device=CPU), torch.arange(5, 25)[None]
    with for_generation(assistant.model.causal_lm):
        assert torch.allclose(assistant.model.llm(ids).logits, language(ids).logits, atol=1e-5)


@pytest.fixture
def own(tmp_path, plugins, tiny_llm_path, tiny_clip_path) -> tuple[TrainConfig, Path]:
    """A config and a checkpoint of it, with training state beside the model."""
    config = TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), lora=Lora(r=4)),
            vision=Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu")),
        ),
        data=Data(datasets=(Dataset(source=use("json", path="x.json"), data_map="llava"),), max_length=64),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=tmp_path / "run"),
    )
    shape = describe_model(config.model, plugins)
    built = build_model(
        config.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32, device=CPU
    )
    folder = tmp_path / "run" / "checkpoint-2"
    save_parts(folder, built, shape.tokenizer.hf)
    torch.save({"step": 2}, folder / "optimizer.pt")
    (folder / "latest").write_text("global_step2")  # DeepSpeed's state beside the model, as a run under ZeRO has it
    (folder / "global_step2").mkdir()
    torch.save({"module": {}}, folder / "global_step2" / "mp_rank_00_model_states.pt")
    write_manifest(folder, config, plugins, "fp32")
    return config, folder


def test_a_checkpoint_of_mmft_becomes_a_model_folder_without_training_state(own, tmp_path, plugins):
    config, checkpoint = own
    out = tmp_path / "out"
    pth_to_hf(checkpoint.parent, out, target=target_of(config), plugins=plugins)  # the run stands for its newest
    assert read_manifest(out).model == config.model
    assert not (out / "optimizer.pt").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "llm_adapter",
        "mmft.json",
        "projector.safetensors",
        "tokenizer",
    ]
    for name in ("projector.safetensors", "llm_adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    load_assistant(out, plugins, device=CPU)


def test_a_language_model_that_mmft_trained_whole_opens_anywhere(own, tmp_path, plugins):
    config, _ = own
    whole = override(config, {"model.llm.lora": None, "model.llm.trainable": True})
    shape = describe_model(whole.model, plugins)
    built = build_model(
        whole.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32, device=CPU
    )
    save_parts(tmp_path / "whole", built, shape.tokenizer.hf)
    write_manifest(tmp_path / "whole", whole, plugins, "fp32")
    pth_to_hf(tmp_path / "whole", tmp_path / "out", target=target_of(whole), plugins=plugins)
    read_manifest(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm")
    with for_generation(built.causal_lm), torch.no_grad():
        assert torch.allclose(plain(ids).logits, built.llm(ids).logits, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "llm")) == len(shape.tokenizer.hf)


def test_a_checkpoint_of_another_config_is_refused_with_both_values(own, tmp_path, plugins):
    config, checkpoint = own
    other = config.model_copy(
        update={"model": config.model.model_copy(update={"llm": config.model.llm.model_copy(update={"path": "./b"})})}
    )
    convert = functools.partial(pth_to_hf, checkpoint, tmp_path / "out", target=target_of(other), plugins=plugins)
    with pytest.raises(
        CheckpointError, match=r"another config: model\.llm\.path: '.*' there, '\./b' here; give that one"
    ):
        convert()
    assert convert(ignore_names=True)
    damaged = checkpoint / "projector.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"projector\.safetensors is damaged"):
        pth_to_hf(checkpoint, tmp_path / "again", target=target_of(config), plugins=plugins)


def test_settings_are_changed_in_our_configs_only(tmp_path, plugins, tiny_llm_path, tiny_clip_path):
    config = xtuner_config(tmp_path, tiny_llm_path, tiny_clip_path, lora=True)
    with pytest.raises(ConfigError, match="--set: changes mmft's configs, not XTuner's"):
        read_target(str(config), plugins, ("model.llm.path=x",))


class Trap:
    """What a pickle can do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (Path("trapped"),))


class Getattr:
    """The one function that is let through by name, because MMEngine's histories use it, asked for another one."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (getattr, (Path("trapped"), "touch"))


def test_a_pth_that_would_run_code_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"projector.model.0.weight": torch.zeros(2, 2)}, "meta": Trap()}, "iter_1.pth")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        read_tensors(Path("iter_1.pth"))
    torch.save({"state_dict": {"weight": torch.zeros(2, 2)}, "meta": getattr}, "iter_2.pth")
    assert read_tensors(Path("iter_2.pth")).keys() == {"weight"}
    torch.save({"state_dict": {"weight": Getattr()}}, "iter_3.pth")
    with pytest.raises(CheckpointError):
        read_tensors(Path("iter_3.pth"))
    Path("stage.pth").mkdir()
    torch.save({"module": {"projector.weight": Trap()}}, "stage.pth/mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        read_deepspeed(Path("stage.pth"))
    assert not Path("trapped").exists()


def test_a_projector_trained_between_other_models_is_refused_by_our_own_record(own, tmp_path, plugins, tiny_llm_path):
    """Of the same shape, from a folder of ours that names another language model."""
    from mmft.convert.importing.importers import bring

    config, checkpoint = own
    moved = tmp_path / "another-llm"
    shutil.copytree(tiny_llm_path, moved)
    other = config.model.model_copy(update={"llm": config.model.llm.model_copy(update={"path": str(moved)})})
    target = target_of(config.model_copy(update={"model": other}))
    for source in (checkpoint / "projector.safetensors", checkpoint):
        with pytest.raises(CheckpointError, match=r"was trained with the llm \S+, the config has \S+another-llm"):
            bring(source, tmp_path / "out", target=target, plugins=plugins)
    assert bring(checkpoint, tmp_path / "out", target=target, plugins=plugins, ignore_names=True)
    assert json.loads((tmp_path / "out" / "mmft.json").read_text())["model"]["llm"]["path"] == str(moved)


def test_an_adapter_alone_is_no_model_that_sees(own, tmp_path, plugins, tiny_llm_path):
    config, _ = own
    language = adapted(AutoModelForCausalLM.from_pretrained(tiny_llm_path), 4, 8)
    torch.save({f"llm.{k}": v for k, v in language.state_dict().items() if "lora_" in k}, tmp_path / "iter_1.pth")
    with pytest.raises(CheckpointError, match="has no projector, and the config a vision encoder; give a text config"):
        pth_to_hf(tmp_path / "iter_1.pth", tmp_path / "out", target=target_of(config), plugins=plugins)
    torch.save({"optimizer.weight": torch.zeros(1)}, tmp_path / "iter_2.pth")
    with pytest.raises(CheckpointError, match="is no checkpoint of XTuner: its parts are optimizer"):
        pth_to_hf(tmp_path / "iter_2.pth", tmp_path / "out", target=target_of(config), plugins=plugins)


def test_weights_of_an_encoder_need_a_config_with_one(tmp_path, plugins, tiny_llm_path, tiny_clip_path):
    vision = CLIPVisionModel.from_pretrained(tiny_clip_path).state_dict()
    torch.save({f"visual_encoder.{key}": value for key, value in vision.items()}, tmp_path / "iter_1.pth")
    text = TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path))),
        data=Data(datasets=(Dataset(source=use("json", path="x.json"), data_map="llava"),), max_length=64),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=Path("out")),
    )
    with pytest.raises(CheckpointError, match=r"weights of a vision encoder, the config no model\.vision"):
        pth_to_hf(tmp_path / "iter_1.pth", tmp_path / "out", target=target_of(text), plugins=plugins)

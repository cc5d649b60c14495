"""What LLaVA, XTuner and TinyLLaVA leave behind is read, held against the models, and gives what it gave there."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

from mmft.cli.convert_import import import_weights
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, override, use
from mmft.config.check import find_problems
from mmft.convert.importing.config import target_of
from mmft.convert.importing.files import read_tensors
from mmft.convert.importing.importers import bring
from mmft.convert.importing.read import read_foreign
from mmft.data.shape import describe_model
from mmft.errors import CheckpointError
from mmft.inference import load_assistant
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import save_parts, write_manifest
from mmft.testing import tiny_llm, tiny_vision

WIDTH = 32  # of the tiny models, both
XTUNER = {"use_rslora": False, "peft_type": "LORA", "bias": "none", "modules_to_save": None}


@pytest.fixture
def config(tiny_llm_path, tiny_clip_path) -> TrainConfig:
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), attention="sdpa", lora=Lora(r=4, alpha=8)),
            vision=Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu"), lora=Lora(r=4)),
        ),
        data=Data(datasets=(Dataset(source=use("json", path="x.json"), data_map="llava"),), max_length=64),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=Path("out"), precision="fp32"),
    )


def projector(width_in: int = WIDTH, width_out: int = WIDTH, depth: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


def prefixed(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in module.state_dict().items()}


def adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    """The model with a LoRA that changes something."""
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def llava_run(folder: Path, llm: Path, *, own: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """A LLaVA LoRA run as its trainer saves it, and the modules it is of."""
    model, made = adapted(AutoModelForCausalLM.from_pretrained(llm), ["q_proj", "down_proj"]), own or projector()
    model.save_pretrained(str(folder), safe_serialization=False)
    torch.save(prefixed("base_model.model.model.mm_projector.", made), folder / "non_lora_trainables.bin")
    names = {"mm_vision_tower": "clip", "_name_or_path": "llm"}
    (folder / "config.json").write_text(json.dumps(names), "utf-8")
    return model, made


def xtuner_folder(folder: Path, llm: Path, clip: Path, inner: str = "") -> tuple[nn.Module, nn.Module, nn.Module]:
    """XTuner's pth_to_hf; `inner` is what older transformers write before the encoder's blocks."""
    model = adapted(AutoModelForCausalLM.from_pretrained(llm), ["v_proj"])
    vision = adapted(CLIPVisionModel.from_pretrained(clip), ["q_proj", "fc1"])
    with torch.no_grad():  # the block behind the selected layer gets no gradient, so its B stays zero
        for name, parameter in vision.named_parameters():
            if "layers.2." in name and "lora_B" in name:
                parameter.zero_()
    made = projector()
    model.save_pretrained(str(folder / "llm_adapter"))
    vision.save_pretrained(str(folder / "visual_encoder_adapter"))
    weights = folder / "visual_encoder_adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    bare = {key.replace("base_model.model.vision_model.", "base_model.model."): value for key, value in state.items()}
    save_file({key.replace("base_model.model.", f"base_model.model.{inner}"): v for key, v in bare.items()}, weights)
    (folder / "projector").mkdir()
    save_file(prefixed("model.", made), folder / "projector" / "model.safetensors")
    (folder / "projector" / "config.json").write_text('{"hidden_act": "gelu", "depth": 2}')
    return model, vision, made


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", "_connector."])
@pytest.mark.parametrize(("depth", "name"), [(1, "linear"), (2, "mlp2x_gelu"), (3, "mlp3x_gelu")])
def test_a_projector_file_becomes_ours_value_by_value(tmp_path, plugins, prefix, depth, name):
    made = projector(48, 32, depth)
    state = prefixed(prefix, made)
    if depth == 1:
        state = {key.replace(".0.", "."): value for key, value in state.items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    lines = bring(tmp_path / "mm_projector.bin", tmp_path / "out", target=None, plugins=plugins)
    assert name in lines[0]
    ours = plugins.projectors.get(name).build(48, 32)
    ours.load_state_dict(load_file(tmp_path / "out" / "projector.safetensors"))
    features = torch.randn(2, 5, 48)
    assert torch.equal(ours(features), made(features))


def test_a_llava_lora_run_answers_as_it_did_there(tmp_path, plugins, config, tiny_llm_path):
    model, made = llava_run(tmp_path / "run", tiny_llm_path)
    bring(tmp_path / "run", tmp_path / "out", target=target_of(config), plugins=plugins)
    assistant = load_assistant(tmp_path / "out", plugins, device=torch.device("cpu"))
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(assistant.model.llm(ids).logits, model(ids).logits, atol=1e-5)
    features = torch.randn(1, 16, WIDTH)
    assert torch.equal(assistant.model.projector(features), made(features))


@pytest.mark.parametrize("inner", ["", "vision_model."])
def test_xtuners_folders_see_as_they_did_there(tmp_path, plugins, config, tiny_llm_path, tiny_clip_path, inner):
    model, vision, made = xtuner_folder(tmp_path / "hf", tiny_llm_path, tiny_clip_path, inner)
    bring(tmp_path / "hf", tmp_path / "out", target=target_of(config), plugins=plugins)
    assistant = load_assistant(tmp_path / "out", plugins, device=torch.device("cpu"))
    pixels, ids = torch.randn(2, 3, 28, 28), torch.arange(5, 25)[None]
    theirs = made(vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    assert torch.allclose(assistant.model.projector(assistant.model.vision(pixels)), theirs, atol=1e-5)
    assert torch.allclose(assistant.model.llm(ids).logits, model(ids).logits, atol=1e-5)


def test_an_xtuner_pth_takes_the_scale_of_its_adapter_from_the_config(tmp_path, plugins, config, tiny_llm_path):
    model, made = adapted(AutoModelForCausalLM.from_pretrained(tiny_llm_path), ["q_proj"]), projector()
    lora = {f"llm.{key}": value for key, value in model.state_dict().items() if "lora_" in key}
    torch.save({"state_dict": {**lora, **prefixed("projector.model.", made)}}, tmp_path / "iter_10.pth")
    bring(tmp_path / "iter_10.pth", tmp_path / "out", target=target_of(config), plugins=plugins)
    assistant = load_assistant(tmp_path / "out", plugins, device=torch.device("cpu"))
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(assistant.model.llm(ids).logits, model(ids).logits, atol=1e-5)
    without = config.model_copy(
        update={"model": config.model.model_copy(update={"llm": config.model.llm.model_copy(update={"lora": None})})}
    )
    with pytest.raises(CheckpointError, match=r"give its r and alpha in model\.llm\.lora"):
        bring(tmp_path / "iter_10.pth", tmp_path / "other", target=target_of(without), plugins=plugins)


def test_a_projector_of_other_sizes_is_refused_with_both_numbers(tmp_path, plugins, config):
    torch.save(prefixed("model.mm_projector.", projector(1024, 4096)), tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"maps 1024 to 4096 values.*gives 32 and its language model takes 32"):
        bring(tmp_path / "mm_projector.bin", tmp_path / "out", target=target_of(config), plugins=plugins)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_size_is_refused_with_both_numbers(tmp_path, plugins, config):
    other = tiny_llm(tmp_path / "llm", width=64)
    llava_run(tmp_path / "run", other, own=projector())
    with pytest.raises(CheckpointError, match="is for 64 values, the model here has 32"):
        bring(tmp_path / "run", tmp_path / "out", target=target_of(config), plugins=plugins)


def test_a_projector_between_other_models_of_the_same_size_is_refused(tmp_path, plugins, config, tiny_llm_path):
    llava_run(tmp_path / "run", tiny_llm_path)
    (tmp_path / "run" / "config.json").write_text('{"mm_vision_tower": "openai/other-clip"}')
    torch.save(prefixed("model.mm_projector.", projector()), tmp_path / "run" / "mm_projector.bin")
    for source in (tmp_path / "run", tmp_path / "run" / "mm_projector.bin"):
        with pytest.raises(CheckpointError, match=r"trained with the encoder openai/other-clip.*--ignore-names"):
            bring(source, tmp_path / "out", target=target_of(config), plugins=plugins)
    assert bring(tmp_path / "run", tmp_path / "out", target=target_of(config), plugins=plugins, ignore_names=True)


class Trap:
    """What a pickle can do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("trapped"),))


def test_a_pickle_that_runs_code_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.mm_projector.0.weight": Trap()}, "mm_projector.bin")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        read_tensors(Path("mm_projector.bin"))
    Path("plain.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"plain\.bin"):
        read_tensors(Path("plain.bin"))
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"model.mm_projector.0.weight": torch.zeros(2, 2), "model.mm_projector.attn.weight": torch.zeros(2)}, "attn"),
        ({"model.mm_projector.0.weight": torch.zeros(2, 2)}, "bias is missing"),
        ({"model.mm_projector.1.weight": torch.zeros(2, 2), "model.mm_projector.1.bias": torch.zeros(2)}, "0, 2, 4"),
        ({"lm_head.weight": torch.zeros(2, 2)}, "lm_head"),
        ({"x": 3}, "no plain table of weights"),
    ],
)
def test_what_is_no_projector_of_ours_is_refused(tmp_path, state, words):
    torch.save(state, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=words):
        read_foreign(tmp_path / "mm_projector.bin")


def test_trained_weights_that_have_no_place_are_not_dropped(tmp_path, tiny_llm_path, tiny_clip_path, plugins, config):
    llava_run(tmp_path / "run", tiny_llm_path)
    state = torch.load(tmp_path / "run" / "non_lora_trainables.bin", weights_only=True)
    state["base_model.model.model.embed_tokens.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "run" / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match="embed_tokens"):
        read_foreign(tmp_path / "run")
    xtuner_folder(tmp_path / "hf", tiny_llm_path, tiny_clip_path)
    with pytest.raises(CheckpointError, match="--for CONFIG"):
        bring(tmp_path / "hf", tmp_path / "out", target=None, plugins=plugins)
    shallow = config.model.vision.model_copy(update={"encoder": use("clip", path=str(tiny_clip_path), select_layer=-3)})
    less = config.model_copy(update={"model": config.model.model_copy(update={"vision": shallow})})
    with pytest.raises(CheckpointError, match=r"layers\.1\..*which the encoder of the config has not"):
        bring(tmp_path / "hf", tmp_path / "out", target=target_of(less), plugins=plugins)


def test_whole_models_beside_the_projector_are_named(tmp_path, plugins):
    (tmp_path / "hf" / "projector").mkdir(parents=True)
    tiny_llm(tmp_path / "hf" / "llm")
    save_file(prefixed("model.", projector()), tmp_path / "hf" / "projector" / "model.safetensors")
    lines = bring(tmp_path / "hf", tmp_path / "out", target=None, plugins=plugins)
    assert any(line.startswith("llm/ holds a whole model") for line in lines)


def test_a_model_that_was_trained_whole_is_the_one_the_config_must_name(tmp_path, plugins, config, tiny_clip_path):
    """Its projector beside the base model it was not trained with would open, and answer nonsense."""
    (tmp_path / "hf" / "projector").mkdir(parents=True)
    own = tiny_llm(tmp_path / "hf" / "llm")
    save_file(prefixed("model.", projector()), tmp_path / "hf" / "projector" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"hf/llm is the llm it was trained with.*set model\.llm\.path to it"):
        bring(tmp_path / "hf", tmp_path / "out", target=target_of(config), plugins=plugins)
    named = override(config, {"model.llm.path": str(own)})
    assert bring(tmp_path / "hf", tmp_path / "out", target=target_of(named), plugins=plugins)


def test_a_run_starts_from_an_imported_adapter_of_the_encoder(tmp_path, plugins, config, tiny_llm_path, tiny_clip_path):
    _, vision, _ = xtuner_folder(tmp_path / "hf", tiny_llm_path, tiny_clip_path)
    bring(tmp_path / "hf", tmp_path / "out", target=target_of(config), plugins=plugins)
    model = override(config, {"model.vision.adapter": str(tmp_path / "out" / "vision_adapter")}).model
    shape = describe_model(model, plugins)
    built = build_model(
        model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert built.vision_trains
    pixels = torch.randn(2, 3, 28, 28)
    theirs = vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.allclose(built.eval().vision(pixels), theirs, atol=1e-5)


def test_an_adapter_of_the_encoder_to_start_from_needs_its_folder_and_lora(tmp_path, plugins, config):
    without = override(config, {"model.vision.adapter": str(tmp_path), "model.vision.lora": None})
    found = [str(problem) for problem in find_problems(without, plugins)]
    assert "model.vision.adapter: an adapter to start from needs model.vision.lora; give its r and alpha" in found
    assert f"model.vision.adapter: {tmp_path} has no adapter_config.json; give a PEFT adapter folder" in found


def test_an_adapter_of_some_layers_is_put_on_those_alone(tmp_path, plugins, config, tiny_llm_path, tiny_clip_path):
    """A layer that bears the same last name and has no adapter stays without one."""
    xtuner_folder(tmp_path / "hf", tiny_llm_path, tiny_clip_path)
    path = tmp_path / "hf" / "visual_encoder_adapter" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "layers.1." not in key}, path)
    bring(tmp_path / "hf", tmp_path / "out", target=target_of(config), plugins=plugins)
    assistant = load_assistant(tmp_path / "out", plugins, device=torch.device("cpu"))
    adapted_layers = {name for name, module in assistant.model.vision.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted_layers) == 2
    assert all("layers.0." in name for name in adapted_layers)


def test_the_command_writes_the_folder_and_never_over_another(tmp_path, plugins):
    torch.save(prefixed("model.mm_projector.", projector()), tmp_path / "mm_projector.bin")
    arguments = [str(tmp_path / "mm_projector.bin"), str(tmp_path / "out")]
    done = CliRunner().invoke(import_weights, arguments, standalone_mode=False)
    assert done.exception is None
    assert "mlp2x_gelu" in done.output
    assert "exists already" in str(CliRunner().invoke(import_weights, arguments, standalone_mode=False).exception)
    assert CliRunner().invoke(import_weights, [*arguments, "--overwrite"], standalone_mode=False).exception is None
    within = [str(tmp_path / "out" / "projector.safetensors"), str(tmp_path / "out"), "--overwrite"]
    assert "which is read" in str(CliRunner().invoke(import_weights, within, standalone_mode=False).exception)
    assert (tmp_path / "out" / "projector.safetensors").is_file()
    missing = CliRunner().invoke(import_weights, [str(tmp_path / "none"), str(tmp_path / "x")], standalone_mode=False)
    assert "does not exist" in str(missing.exception)


def test_a_tinyllava_connector_is_read_from_its_folder(tmp_path):
    (tmp_path / "connector").mkdir()
    torch.save(prefixed("_connector.", projector()), tmp_path / "connector" / "pytorch_model.bin")
    assert read_foreign(tmp_path).projector_name == "mlp2x_gelu"


def test_a_siglip_encoder_takes_its_adapter_too(tmp_path, plugins, config):
    siglip = tiny_vision(tmp_path / "siglip", "siglip")
    from transformers import SiglipVisionModel

    vision = adapted(SiglipVisionModel.from_pretrained(siglip), ["q_proj"])
    with torch.no_grad():
        for name, parameter in vision.named_parameters():
            if "layers.2." in name and "lora_B" in name:
                parameter.zero_()
    folder = tmp_path / "hf"
    vision.save_pretrained(str(folder / "visual_encoder_adapter"))
    (folder / "projector").mkdir()
    made = projector()
    save_file(prefixed("model.", made), folder / "projector" / "model.safetensors")
    part = Vision(encoder=use("siglip", path=str(siglip), select_layer=-2), projector=use("mlp2x_gelu"))
    here = config.model_copy(update={"model": config.model.model_copy(update={"vision": part})})
    bring(folder, tmp_path / "out", target=target_of(here), plugins=plugins)
    assistant = load_assistant(tmp_path / "out", plugins, device=torch.device("cpu"))
    pixels = torch.randn(2, 3, 28, 28)
    theirs = made(vision(pixels, output_hidden_states=True).hidden_states[-2])
    assert torch.allclose(assistant.model.projector(assistant.model.vision(pixels)), theirs, atol=1e-5)


def test_a_projector_of_ours_with_a_language_model_trained_whole_names_that_one(tmp_path, plugins, config):
    """Beside the base model it would open too, and answer nonsense."""
    run = tmp_path / "run"
    shape = describe_model(config.model, plugins)
    whole = override(config, {"model.llm.lora": None, "model.llm.trainable": True, "model.vision.lora": None})
    built = build_model(
        whole.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    save_parts(run, built, shape.tokenizer.hf)
    shape.tokenizer.hf.save_pretrained(run / "llm")
    write_manifest(run, whole, plugins, "fp32")
    with pytest.raises(CheckpointError, match=r"run/llm is the llm it was trained with, the config has"):
        bring(run, tmp_path / "out", target=target_of(config), plugins=plugins)
    named = target_of(override(config, {"model.llm.path": str(run / "llm")}))
    assert bring(run, tmp_path / "out", target=named, plugins=plugins)

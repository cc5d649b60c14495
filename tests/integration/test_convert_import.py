"""Whole models of others become ours: the same logits, the same loss when training goes on from them."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from import_models import LLAVA_HF, llava, pixels_of, save_hf, save_own
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from mmft.cli.convert_import import import_weights
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.convert.importing.whole import bring_whole, is_whole
from mmft.data.shape import describe_model
from mmft.data.tokenize import tokenize
from mmft.errors import CheckpointError, MmftError
from mmft.inference import load_assistant
from mmft.modeling.attention import for_generation
from mmft.modeling.checkpoint import read_manifest
from mmft.testing import CHATML
from mmft.train.run import train
from mmft.types import Conversation, Image, Message, Text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """Wider than tall, so that padding and cropping differ."""
    path = tmp_path_factory.mktemp("picture") / "a.png"
    ramp = PILImage.linear_gradient("L").resize((61, 40))
    PILImage.merge("RGB", (ramp, ramp.rotate(90).resize((61, 40)), ramp.rotate(180))).save(path)
    return path


@torch.no_grad()
def logits_differ_by(assistant, model, pixels: torch.Tensor, picture: Path) -> float:
    """The largest difference between our logits of a question about a picture and transformers'."""
    prompt = assistant.prompt(Conversation((Message("user", (Image(picture), Text("\nWhat is it?"))),)))
    ids = torch.from_numpy(prompt.input_ids.astype("int64"))[None]
    assert int((ids == 3).sum()) == 16
    ours = assistant.shape.vision.transform(PILImage.open(picture).convert("RGB"))[None]
    assert torch.equal(ours, pixels)
    theirs = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    with for_generation(assistant.model.causal_lm):
        return float((assistant.model(input_ids=ids, pixel_values=ours)["logits"] - theirs).abs().max())


@pytest.mark.parametrize(
    ("spelling", "shards", "encoder", "tied"), [(0, 2, "clip", False), (1, 1, "clip", True), (0, 1, "siglip", False)]
)
def test_a_llava_hf_model_gives_here_what_it_gives_in_transformers(
    tmp_path, plugins, picture, spelling, shards, encoder, tied
):
    own_template = CHATML if encoder == "clip" else LLAVA_HF
    model = llava(tmp_path / "hf", encoder=encoder, tied=tied, template=own_template)
    source = save_hf(model, tmp_path / "hf", spelling=spelling, shards=shards, kind=encoder, pads=tied)
    assert is_whole(source)
    lines = bring_whole(source, tmp_path / "out", plugins=plugins)
    assert any(line.startswith("verified in float32 against transformers: 11 probes") for line in lines)
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["verified"]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.model.vision.encoder.options["pad_to_square"] is tied
    assert manifest.chat_template == ("auto" if encoder == "clip" else "vicuna")
    assistant = load_assistant(tmp_path / "out", plugins, device=CPU)
    assert logits_differ_by(assistant, model, pixels_of(PILImage.open(picture), source), picture) < 1e-5


@pytest.mark.parametrize(
    ("tower_inside", "aspect", "family", "architecture"),
    [(True, "pad", "llama", "LlavaLlamaForCausalLM"), (False, "square", "qwen2", "LlavaQwenForCausalLM")],
)
def test_a_checkpoint_of_llava_itself_gives_what_its_weights_give(
    tmp_path, plugins, picture, tower_inside, aspect, family, architecture
):
    model = llava(tmp_path / "own", family=family)
    tower = tmp_path / "own-tower"
    if not tower_inside:
        from transformers import CLIPVisionModel

        state = {f"model.vision_tower.{k}": v for k, v in CLIPVisionModel.from_pretrained(tower).state_dict().items()}
        missing = model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
    changes = {"image_aspect_ratio": aspect, "architectures": [architecture]}
    source = save_own(model, tmp_path / "own", tower_inside=tower_inside, **changes)
    lines = bring_whole(source, tmp_path / "out", plugins=plugins, chat_template="chatml")
    assert "not run beside LLaVA's own code" in lines[3]
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # a model folder may be moved
    manifest = read_manifest(tmp_path / "elsewhere")
    assert manifest.model.vision.encoder.options["pad_to_square"] is (aspect == "pad")
    inside = str(tmp_path / "elsewhere" / "vision_encoder") if tower_inside else str(tower)
    assert manifest.model.vision.encoder.options["path"] == inside
    assistant = load_assistant(tmp_path / "elsewhere", plugins, device=CPU)
    pixels = pixels_of(PILImage.open(picture), tower, pad=aspect == "pad")
    assert logits_differ_by(assistant, model, pixels, picture) < 1e-5


def test_training_goes_on_from_an_imported_model_with_the_loss_it_has_in_transformers(tmp_path, plugins, picture):
    model = llava(tmp_path / "hf")
    source = save_hf(model, tmp_path / "hf")
    out = tmp_path / "out"
    bring_whole(source, out, plugins=plugins, chat_template="chatml")
    imported = read_manifest(out).model
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": picture.name, "conversations": turns}]))
    vision = Vision(encoder=imported.vision.encoder, projector=use("mlp2x_gelu"), projector_weights=out)
    config = TrainConfig(
        model=Model(llm=LLM(path=str(out / "llm"), trainable=True), vision=vision),
        data=Data(
            datasets=(
                Dataset(
                    source=use("json", path=str(tmp_path / "data.json")), data_map="llava", image_folder=picture.parent
                ),
            ),
            chat_template="chatml",
            max_length=128,
        ),
        optim=Optim(lr=1e-4, max_steps=1),
        runtime=Runtime(output_dir=tmp_path / "run", device="cpu", precision="fp32", logging_steps=1),
    )  # fmt: skip
    assert train(config, plugins) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line["loss"] for line in lines if "loss" in line)
    shape = describe_model(config.model, plugins)
    template = plugins.chat_templates.get("chatml").for_tokenizer(shape.tokenizer.hf)
    said = Conversation(
        (Message("user", (Image(picture), Text("\nWhat is it?"))), Message("assistant", (Text("A cat."),)))
    )
    sample = tokenize(template.render(said), shape.tokenizer)
    ids = torch.from_numpy(sample.input_ids.astype("int64"))[None]
    labels = torch.where(torch.from_numpy(sample.loss_mask)[None], ids, -100)
    pixels = pixels_of(PILImage.open(picture), source)
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert first == pytest.approx(float(theirs), rel=1e-5)


def test_a_llava_of_transformers_with_other_weights_is_not_called_done(tmp_path, plugins, monkeypatch):
    """The gate can fail: one weight of the projector changed on its way."""
    import mmft.convert.importing.apart as apart

    source = save_hf(llava(tmp_path / "hf"), tmp_path / "hf")
    read = apart.read_projector

    def changed(state, where):
        found = read(state, where)
        found["2.weight"] = found["2.weight"] * 1.5
        return found

    monkeypatch.setattr(apart, "read_projector", changed)
    with pytest.raises(MmftError, match="the logits differ by"):
        bring_whole(source, tmp_path / "out", plugins=plugins)
    assert not (tmp_path / "out").exists()


def change(source: Path, **values) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, "its class drops 0 of the encoder's tokens, mmft the 1"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer is .*; mmft has one layer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; mmft has 'gelu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False; mmft has True"),
        ({"model_type": "llava_next"}, "is a model of type llava_next; mmft reads LLaVA-1.5's, 'llava'"),
    ],
)
def test_a_llava_hf_model_that_mmft_has_not_is_refused_by_its_setting(tmp_path, plugins, values, words):
    source = save_hf(llava(tmp_path / "hf"), tmp_path / "hf")
    change(source, **values)
    with pytest.raises(CheckpointError, match=words):
        bring_whole(source, tmp_path / "out", plugins=plugins)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'; mmft has 'flat'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; mmft has 'pad' or 'square'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'; mmft has 'patch'"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "is a LlavaMptForCausalLM; mmft reads LlavaLlamaForCausalLM"),
        ({"hidden_size": 64}, "its language model is not the config's: "),
        ({"mm_vision_tower": "./nowhere"}, "--vision-encoder: the folder ./nowhere does not exist"),
    ],
)
def test_a_checkpoint_of_llava_that_mmft_has_not_is_refused_by_its_setting(tmp_path, plugins, values, words):
    source = save_own(llava(tmp_path / "own"), tmp_path / "own", tower_inside=False, shards=1, pickled=False)
    change(source, **values)
    with pytest.raises(MmftError, match=words):
        bring_whole(source, tmp_path / "out", plugins=plugins)
    assert not (tmp_path / "out").exists()


def test_a_missing_or_foreign_weight_is_named(tmp_path, plugins):
    source = save_own(llava(tmp_path / "own"), tmp_path / "own", tower_inside=False, shards=1, pickled=False)
    whole = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for state, words in (
        ({key: value for key, value in whole.items() if key != name}, f"missing {name}"),
        (whole | {"model.image_newline": torch.zeros(32)}, "unexpected model.image_newline"),
        ({key: value for key, value in whole.items() if "mm_projector" not in key}, "has no projector"),
    ):
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            bring_whole(source, tmp_path / "out", plugins=plugins)


def test_a_template_that_is_none_is_refused_before_a_weight_is_written(tmp_path, plugins, monkeypatch):
    import mmft.convert.importing.whole as whole

    source = save_hf(llava(tmp_path / "hf"), tmp_path / "hf")
    monkeypatch.setattr(whole, "take_apart", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "out").mkdir()  # an empty folder is free
    with pytest.raises(MmftError, match="nonsense"):
        bring_whole(source, tmp_path / "out", plugins=plugins, chat_template="nonsense")
    assert not list(tmp_path.glob(".*"))


def test_what_is_half_written_goes_whatever_stopped_it(tmp_path, plugins, monkeypatch):
    import mmft.convert.importing.whole as whole

    def stopped(_, folder, __):
        (folder / "llm").mkdir()
        raise KeyboardInterrupt

    source = save_hf(llava(tmp_path / "hf"), tmp_path / "hf")
    monkeypatch.setattr(whole, "take_apart", stopped)
    with pytest.raises(KeyboardInterrupt):
        bring_whole(source, tmp_path / "out", plugins=plugins)
    assert not list(tmp_path.glob(".*"))


def test_a_whole_model_takes_no_config_and_a_part_no_template(tmp_path, plugins):
    source = save_hf(llava(tmp_path / "hf"), tmp_path / "hf")
    run = CliRunner().invoke
    refused = run(import_weights, [str(source), str(tmp_path / "out"), "--for", "x.py"], standalone_mode=False)
    assert "says itself what it is; leave --for out" in str(refused.exception)
    (tmp_path / "mm_projector.bin").write_bytes(b"")
    part = [str(tmp_path / "mm_projector.bin"), str(tmp_path / "out"), "--chat-template", "vicuna"]
    assert "are for whole models" in str(run(import_weights, part, standalone_mode=False).exception)
    unknown = run(import_weights, ["nobody/llava", str(tmp_path / "out")], standalone_mode=False)
    assert "SOURCE: 'nobody/llava' is no folder and was not found on huggingface" in str(unknown.exception)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    again = run(import_weights, [str(source), str(tmp_path / "out")], standalone_mode=False)
    assert "exists already" in str(again.exception)

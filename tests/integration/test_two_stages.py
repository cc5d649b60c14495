"""Both stages for real: 4-bit base, LoRA, projector, packed and not; what must move and what must not."""

import json
import signal
from pathlib import Path

import pytest
import torch

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Prompt, Runtime, TrainConfig, Vision, override, use
from mmft.errors import CheckpointError, DataError
from mmft.inference import find_model, load_assistant
from mmft.modeling.build import build_model
from mmft.modeling.checkpoint import read_manifest
from mmft.modeling.llm import quantized_layers
from mmft.train.run import train
from mmft.types import Conversation, Image, Message, Text

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llm_path, tiny_clip_path):
    """A folder with pictures, records and the two models."""
    from PIL import Image as PILImage

    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    records = []
    for i in range(12):
        colour = COLOURS[i % 4]
        PILImage.new("RGB", (30 + i, 30), colour).save(root / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhat colour?"), ("gpt", colour), ("human", "Sure?"), ("gpt", "Yes.")]
        records.append({"id": i, "image": f"{i}.png", "conversations": [{"from": f, "value": v} for f, v in turns]})
    for i in range(4):
        turns = [("human", f"Say {i}"), ("gpt", str(i))]
        records.append({"id": f"t{i}", "conversations": [{"from": f, "value": v} for f, v in turns]})
    (root / "records.json").write_text(json.dumps(records))
    return {"root": root, "llm": tiny_llm_path, "encoder": tiny_clip_path}


def stage1(world, name="stage1") -> TrainConfig:
    root = world["root"]
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(world["llm"])),
            vision=Vision(encoder=use("clip", path=str(world["encoder"])), projector=use("mlp2x_gelu")),
        ),
        data=Data(
            datasets=(
                Dataset(source=use("json", path=root / "records.json"), data_map="llava", image_folder=root / "images"),
            ),
            chat_template="chatml",
            max_length=256,
            group_by_modality=True,
        ),
        optim=Optim(lr=1e-2, max_steps=4, batch_size_per_device=2, accumulate=2, epochs=10),
        runtime=Runtime(output_dir=root / name, save_steps=2, logging_steps=1, device="cpu"),
    )


def stage2(world, name="stage2", **changes) -> TrainConfig:
    return override(
        stage1(world, name),
        {
            "model.llm": LLM(path=str(world["llm"]), quantization="nf4", lora=Lora(r=4, alpha=8)).model_dump(),
            "model.vision.projector_weights": world["root"] / "stage1" / "final",
            "optim.projector_lr": 1e-3,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def first(world, plugins):
    config = stage1(world)
    assert train(config, plugins) == 0
    return config


@pytest.fixture(scope="module")
def second(world, plugins, first):
    config = override(
        stage2(world),
        {
            "data.group_by_modality": False,
            "data.packing": True,
            "runtime.sample_steps": 2,
            "runtime.report_to": ("tensorboard",),
            "runtime.samples": (Prompt(text="What colour?", images=(world["root"] / "images" / "0.png",)),),
        },
    )
    assert train(config, plugins) == 0
    return config


def built(config, plugins, weights=None):
    from mmft.data.shape import describe_model

    shape = describe_model(config.model, plugins)
    torch.manual_seed(config.runtime.seed)
    return build_model(
        config.model,
        plugins,
        info=shape.vision,
        image_id=shape.tokenizer.image_id,
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights=weights,
    )


def test_stage_1_trains_the_projector_and_writes_nothing_else(first, plugins):
    final = first.runtime.output_dir / "final"
    files = {str(p.relative_to(final)) for p in final.rglob("*") if p.is_file() and "tokenizer" not in str(p)}
    assert files == {"mmft.json", "projector.safetensors"}
    before, after = built(first, plugins), built(first, plugins, final)
    assert not torch.equal(before.projector[0].weight, after.projector[0].weight)


def test_frozen_parts_are_bitwise_unchanged_and_trained_parts_change(world, plugins, first):
    """The very modules that were trained, looked at before and after."""
    from mmft.train import run

    config = stage2(world, "moved")
    seen = {}
    original = run.module_table  # called right after the build, with the model

    def remember(model, rates):
        seen["model"] = model
        seen["before"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return original(model, rates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "module_table", remember)
        assert train(config, plugins) == 0
    trained = {name for name, p in seen["model"].named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trained)
    assert any(name.startswith("projector.") for name in trained)
    for name, parameter in seen["model"].named_parameters():
        same = torch.equal(parameter, seen["before"][name])
        assert same == (name not in trained), name


def test_only_the_language_model_is_quantised(second, plugins):
    model = built(second, plugins)
    assert quantized_layers(model.llm)
    assert not quantized_layers(model.vision)
    assert not quantized_layers(model.projector)
    assert not quantized_layers(model.causal_lm.get_output_embeddings())


def test_a_saved_model_gives_the_same_logits_when_loaded(second, plugins):
    ids = torch.arange(5, 25)[None]
    logits = []
    for folder in ("final", "checkpoint-4"):
        assistant = load_assistant(second.runtime.output_dir / folder, plugins, device=torch.device("cpu"))
        with torch.no_grad():
            positions = torch.arange(20)[None]
            logits.append(assistant.model(ids, position_ids=positions)["logits"])
    assert torch.equal(*logits)
    with torch.no_grad():
        untrained = built(second, plugins).eval()(ids, position_ids=torch.arange(20)[None])["logits"]
    assert not torch.equal(logits[0], untrained)


def test_a_run_leaves_what_a_person_opens(second):
    folder = second.runtime.output_dir
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "What colour?" in page
    assert "finished at step 4" in page
    assert "http://" not in page and "https://" not in page.split("<h2>Config</h2>")[0]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step-000000{n}.json" for n in (0, 2, 4)]
    assert list((folder / "tensorboard").glob("events*"))
    assert not (folder / ".saving").exists()


def test_save_total_limit_keeps_the_newest(second):
    assert [p.name for p in sorted(second.runtime.output_dir.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]


def test_the_newest_finished_run_is_found_and_answers_about_a_picture(second, plugins, world):
    folder = find_model(str(second.runtime.output_dir))
    assert folder.name == "final"
    assistant = load_assistant(folder, plugins, device=torch.device("cpu"))
    asked = Conversation((Message("user", (Image(world["root"] / "images" / "1.png"), Text("\nWhat colour?"))),))
    from mmft.inference import Generation

    answer = assistant.answer(asked, Generation(max_new_tokens=5))
    assert assistant.answer_batch([asked, asked], Generation(max_new_tokens=5)) == [answer.strip()] * 2


def test_a_lora_on_the_encoder_trains_and_comes_back(world, plugins, first):
    lora = {"model.vision.lora": {"r": 4, "alpha": 8}, "optim.vision_lr": 5e-3, "optim.max_steps": 2}
    config = stage2(world, "vision_lora", **lora)
    assert train(config, plugins) == 0
    final = config.runtime.output_dir / "final"
    assert (final / "vision_adapter" / "adapter_model.safetensors").is_file()
    loaded = load_assistant(final, plugins, device=torch.device("cpu")).model
    adapted = [p for n, p in loaded.vision.named_parameters() if "lora_B" in n]
    assert adapted
    assert any(p.abs().max() > 0 for p in adapted)


def test_every_weight_of_a_text_model_trains_through_the_same_path(world, plugins):
    root = world["root"]
    (root / "text.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n' * 8
    )
    config = TrainConfig(
        model=Model(llm=LLM(path=str(world["llm"]), trainable=True)),
        data=Data(
            datasets=(Dataset(source=use("jsonl", path=root / "text.jsonl"), data_map="messages"),), max_length=64
        ),
        optim=Optim(lr=1e-2, max_steps=3, epochs=9),
        runtime=Runtime(output_dir=root / "text", save_steps=2, logging_steps=1, device="cpu"),
    )
    assert train(config, plugins) == 0
    assistant = load_assistant(find_model(str(root / "text")), plugins, device=torch.device("cpu"))
    assert not assistant.sees


def test_int8_trains(world, plugins, first):
    config = stage2(world, "int8", **{"model.llm.quantization": "int8", "optim.max_steps": 2})
    assert train(config, plugins) == 0
    lines = (config.runtime.output_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["grad_norm"] > 0


def test_cached_features_train_the_same_projector_bit_for_bit(world, plugins, first):
    config = override(stage1(world, "cached"), {"model.vision.feature_cache": world["root"] / "features"})
    assert train(config, plugins) == 0
    weights = [built(c, plugins, c.runtime.output_dir / "final").projector[0].weight for c in (first, config)]
    assert torch.allclose(*weights, atol=1e-6)


def test_a_checkpoint_of_another_config_is_refused(world, plugins, first):
    other = override(first, {"optim.lr": 1e-3})
    with pytest.raises(CheckpointError, match="belongs to another config"):
        train(other, plugins, resume=True)


def test_a_damaged_checkpoint_is_named_and_passed_over(world, plugins, second):
    newest = second.runtime.output_dir / "checkpoint-4" / "projector.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1])
    try:
        with pytest.raises(CheckpointError, match=r"projector\.safetensors is damaged"):
            read_manifest(newest.parent)
        assert train(second, plugins, resume=True) == 0
        assert "passed over" in (second.runtime.output_dir / "run.log").read_text()
    finally:
        newest.write_bytes(content)


def test_an_earlier_run_is_not_overwritten_unasked(plugins, first):
    with pytest.raises(CheckpointError, match="holds an earlier run"):
        train(first, plugins)


def test_a_corrupt_picture_ends_the_run_with_its_name(world, plugins, first):
    broken = world["root"] / "broken"
    broken.mkdir()
    (broken / "0.png").write_bytes(b"not a picture")
    record = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    (broken / "r.json").write_text(json.dumps([record] * 4))
    source = {"data.datasets.0.source.path": broken / "r.json", "data.datasets.0.image_folder": broken}
    with pytest.raises(DataError, match=r"0\.png"):
        train(override(stage1(world, "corrupt"), source), plugins)


def test_ctrl_c_finishes_the_step_saves_and_exits_130(world, plugins, first):
    from transformers import TrainerCallback

    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    from mmft.train import run

    config = override(stage1(world, "interrupted"), {"runtime.save_steps": 100})
    original = run.make_trainer

    def with_ctrl_c(*args, **options):
        trainer, *others = original(*args, **options)
        trainer.add_callback(PressCtrlC())
        return trainer, *others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_trainer", with_ctrl_c)
        assert train(config, plugins) == 130
    assert (config.runtime.output_dir / "checkpoint-3" / "mmft.json").is_file()
    assert not (config.runtime.output_dir / "final").exists()
    assert Path(config.runtime.output_dir / "report.html").is_file()

"""A killed run goes on as if nothing had happened: bitwise, mid-epoch, with LoRA dropout and packing."""

import json
import signal
from pathlib import Path

import pytest

from mmft.config.load import load_config
from mmft.errors import CheckpointError
from mmft.plugins import load_plugins
from mmft.train.folder import find_checkpoint

CONFIG = """
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use

config = TrainConfig(
    model=Model(
        llm=LLM(path={llm!r}, quantization="nf4", lora=Lora(r=4, alpha=8, dropout=0.2)),
        vision=Vision(encoder=use("clip", path={clip!r}), projector=use("mlp2x_gelu")),
    ),
    data=Data(
        datasets=(Dataset(source=use("json", path={data!r}), data_map="llava", image_folder={images!r}),),
        chat_template="chatml",
        max_length=128,
        packing=True,
    ),
    optim=Optim(lr=1e-2, epochs=3, accumulate=2),
    runtime=Runtime(output_dir={out!r}, save_steps=2, logging_steps=1, device="cpu"),
)
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_llm_path, tiny_clip_path):
    from PIL import Image as PILImage

    root = tmp_path_factory.mktemp("resume")
    records = []
    for i in range(16):
        PILImage.new("RGB", (20 + i, 30), (i * 15, 90, 200 - i * 10)).save(root / f"{i}.png")
        turns = [("human", "<image>\nWhat colour?"), ("gpt", f"number {i}")]
        if i % 4 == 3:
            turns[0] = ("human", "Say it")
        record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        records.append(record | ({"image": f"{i}.png"} if i % 4 != 3 else {}))
    (root / "r.json").write_text(json.dumps(records))
    return {"llm": str(tiny_llm_path), "clip": str(tiny_clip_path), "data": str(root / "r.json"), "images": str(root)}


def write_config(folder: Path, setting) -> Path:
    folder.mkdir()
    path = folder / "config_of_run.py"
    path.write_text(CONFIG.format(**setting, out=str(folder / "run")))
    return path


def losses(training, folder: Path):
    return [(m["step"], m["loss"]) for m in training.metrics(folder)]


@pytest.fixture(scope="module")
def straight(training, setting, tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("runs") / "straight", setting)
    training.run(config)
    return config.parent / "run"


def test_a_run_killed_in_the_middle_of_an_epoch_ends_in_bitwise_the_same_weights(training, setting, straight, tmp_path):
    config = write_config(tmp_path / "killed", setting)
    run = config.parent / "run"
    training.kill_at(config, 4)
    assert "going on from" in training.run(config, "--resume")
    assert losses(training, run) == losses(training, straight)
    expected, got = training.weights(straight), training.weights(run)
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)


def test_steps_per_epoch_make_step_4_the_middle_of_one(training, straight):
    """What the test above relies on: step 4 is no epoch's end."""
    epochs = [m["epoch"] for m in training.metrics(straight)]
    assert epochs[3] != int(epochs[3])
    assert epochs[-1] == 3


def test_resume_without_a_checkpoint_says_so_and_exits_2(training, setting, tmp_path):
    output = training.run(write_config(tmp_path / "nothing", setting), "--resume", expected=2)
    assert "nothing to resume from" in output
    assert "Traceback" not in output


def test_a_model_is_refused_as_a_checkpoint_before_anything_is_loaded(training, straight):
    plugins = load_plugins()
    config = load_config(str(straight / "config.py"), plugins)
    with pytest.raises(CheckpointError, match=r"final is a model, not a checkpoint: it has no trainer_state.json"):
        find_checkpoint(config, plugins, straight / "final")
    newest = find_checkpoint(config, plugins, True)
    assert newest is not None and newest.name.startswith("checkpoint-")


def test_sigterm_saves_and_exits_143(training, setting, tmp_path):
    config = write_config(tmp_path / "terminated", setting)
    run = config.parent / "run"
    process = training.start(config, "--set", "runtime.save_steps=1000", "--set", "optim.epochs=300")
    training.wait_for(process, run / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    output = training.finish(process, expected=143)
    assert "go on with: --resume" in output
    assert len(list(run.glob("checkpoint-*/mmft.json"))) == 1

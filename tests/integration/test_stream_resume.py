"""A killed streaming run with pictures goes on at the exact sample: bitwise the same weights, each bad record once."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

CONFIG = """
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use

config = TrainConfig(
    model=Model(
        llm=LLM(path={llm!r}, lora=Lora(r=4, alpha=8, dropout={dropout})),
        vision=Vision(encoder=use("clip", path={clip!r}), projector=use("mlp2x_gelu")),
    ),
    data=Data(
        datasets=(
            Dataset(source=use("jsonl", path={pictures!r}), data_map="llava", image_folder={folder!r}),
            Dataset(source=use("jsonl", path={texts!r}), data_map="alpaca"),
        ),
        chat_template="chatml",
        max_length=128,
        packing={packing},
        streaming=True,
        max_bad_fraction=0.2,
        num_workers={workers},
    ),
    optim=Optim(lr=1e-2, max_steps={steps}, accumulate=2, batch_size_per_device={batch}),
    runtime=Runtime(output_dir={out!r}, save_steps={save}, save_total_limit=9, logging_steps=1, device="cpu"),
)
"""
STEPS = 12
BAD = [("pictures", 5)] + [("pictures", n) for n in range(8, 61, 10)] + [("texts", n) for n in range(8, 41, 10)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_llm_path, tiny_clip_path):
    """60 records with pictures and 40 without; every tenth is bad, and one picture is cut off."""
    root = tmp_path_factory.mktemp("stream")
    (root / "pictures.jsonl").write_text("".join(json.dumps(with_picture(root, i)) + "\n" for i in range(60)))
    texts = [{"instruction": f"{i}", "output": f"it answers {i} " * (1 + i % 4)} for i in range(40)]
    texts = [{"id": i} if i % 10 == 7 else text for i, text in enumerate(texts)]
    (root / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    paths = {name: str(root / f"{name}.jsonl") for name in ("pictures", "texts")}
    return {"llm": str(tiny_llm_path), "clip": str(tiny_clip_path), "folder": str(root), **paths}


def with_picture(root: Path, number: int) -> dict[str, object]:
    if number % 10 == 7:
        return {"id": number}
    path = root / f"{number}.png"
    Image.new("RGB", (20 + number, 30), (number * 4, 90, 250 - number * 4)).save(path)
    if number == 4:
        path.write_bytes(path.read_bytes()[:-30])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"number {number} " * (number % 3)}]
    return {"image": path.name, "conversations": [turns[0], {**turns[1], "value": turns[1]["value"] or "none"}]}


def write_config(folder: Path, setting, **options) -> Path:
    folder.mkdir()
    path = folder / "config_of_run.py"
    usual = {"workers": 0, "steps": STEPS, "dropout": 0.2, "packing": True, "batch": 2, "save": 4}
    path.write_text(CONFIG.format(**setting, out=str(folder / "run"), **usual | options))
    return path


def seen(training, folder: Path):
    return [(m["step"], m["loss"], m["epoch"]) for m in training.metrics(folder)]


def dropped(folder: Path):
    lines = map(json.loads, (folder / "dropped.jsonl").read_text().splitlines())
    return sorted((Path(line["source"]).stem, line["record"]) for line in lines)


def stream_state(run: Path, step: int):
    return json.loads((run / f"checkpoint-{step}" / "stream.json").read_text())


@pytest.fixture(scope="module")
def straight(training, setting, tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("runs") / "straight", setting)
    training.run(config)
    return config.parent / "run"


def test_a_killed_stream_ends_in_bitwise_the_same_weights(training, setting, straight, tmp_path):
    """The killed run has a worker that reads ahead, the straight one has none."""
    config = write_config(tmp_path / "killed", setting, workers=1)
    run = config.parent / "run"
    training.kill_at(config, 4)
    assert "going on from" in training.run(config, "--resume")
    assert seen(training, run) == seen(training, straight)
    expected, got = training.weights(straight), training.weights(run)
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert dropped(run) == dropped(straight)
    assert stream_state(run, STEPS) == stream_state(straight, STEPS)


def test_step_4_is_the_middle_of_a_pass_and_the_run_is_longer_than_one(training, straight):
    """What the test above relies on."""
    assert stream_state(straight, 4)["position"]["row"] > 0
    assert seen(training, straight)[3][2] == 0
    assert seen(training, straight)[-1][2] >= 1
    assert any("lora_A" in name for name in training.weights(straight))
    assert any("lora" not in name for name in training.weights(straight))  # the projector's: pictures are trained on


def test_each_bad_record_is_listed_once_over_all_passes(straight):
    assert dropped(straight) == BAD


def test_a_checkpoint_carries_its_position_under_its_manifest(straight):
    manifest = json.loads((straight / "checkpoint-12" / "mmft.json").read_text())
    assert "stream.json" in manifest["files"]


def test_nothing_is_kept_on_disk_beside_the_run(straight):
    assert not list(straight.parent.rglob("tokens-*"))
    assert not list(straight.parent.rglob("*.bin"))


@pytest.fixture(scope="module")
def two_ranks(training, setting, tmp_path_factory):
    """The same data on two ranks: half the batch for each."""
    folder = tmp_path_factory.mktemp("ranks") / "straight"
    training.run(write_config(folder, setting, dropout=0.0, steps=8, save=4, batch=1), ranks=2)
    return folder / "run"


def test_two_ranks_together_train_on_the_rows_of_one(training, setting, two_ranks, tmp_path):
    """Row by row, none left out and none twice: each step has the loss of one rank with twice the batch."""
    config = write_config(tmp_path / "alone", setting, dropout=0.0, steps=8, save=4)
    training.run(config)
    alone, together = seen(training, config.parent / "run"), seen(training, two_ranks)
    assert [(step, epoch) for step, _, epoch in together] == [(step, epoch) for step, _, epoch in alone]
    assert [loss for _, loss, _ in together] == pytest.approx([loss for _, loss, _ in alone], rel=1e-5)
    assert alone[-1][2] >= 1
    assert dropped(two_ranks) == dropped(config.parent / "run") == BAD
    assert stream_state(two_ranks, 8) == stream_state(config.parent / "run", 8)


def test_two_ranks_resumed_end_in_bitwise_the_same_weights(training, setting, two_ranks, tmp_path):
    config = write_config(tmp_path / "resumed", setting, dropout=0.0, steps=8, save=4, batch=1)
    run = config.parent / "run"
    for name in ("checkpoint-4", "metrics.jsonl", "dropped.jsonl"):  # as a run leaves it that is killed after step 4
        (shutil.copytree if name.startswith("check") else shutil.copy)(two_ranks / name, run / name)
    assert "going on from" in training.run(config, "--resume", ranks=2)
    assert seen(training, run) == seen(training, two_ranks)
    expected, got = training.weights(two_ranks), training.weights(run)
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert dropped(run) == BAD
    assert stream_state(run, 8) == stream_state(two_ranks, 8)


def test_too_many_bad_records_end_a_stream_with_one_line_and_exit_2(training, setting, tmp_path):
    config = write_config(tmp_path / "bad", setting)
    output = training.run(config, "--set", "data.max_bad_fraction=0.05", expected=2)
    assert "Traceback" not in output
    assert "dropped 10 of the 100 records read; at most 5.0% is allowed (data.max_bad_fraction)" in output

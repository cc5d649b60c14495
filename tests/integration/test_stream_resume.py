"""A killed streaming run goes on at the exact sample: bitwise the same weights, each bad record listed once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

CONFIG = """
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use

config = TrainConfig(
    model=Model(llm=LLM(path={llm!r}, lora=Lora(r=4, alpha=8, dropout=0.2))),
    data=Data(
        datasets=(
            Dataset(source=use("jsonl", path={one!r}), data_map="alpaca"),
            Dataset(source=use("jsonl", path={other!r}), data_map="alpaca"),
        ),
        chat_template="chatml",
        max_length=256,
        packing=True,
        streaming=True,
        max_bad_fraction=0.2,
        num_workers={workers},
    ),
    optim=Optim(lr=1e-2, max_steps={steps}, accumulate=2, batch_size_per_device=2),
    runtime=Runtime(output_dir={out!r}, save_steps=4, logging_steps=1, device="cpu"),
)
"""
STEPS = 12


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_llm_path):
    """Two files of 60 and 40 records, every tenth of them bad: a pass is some five steps."""
    root = tmp_path_factory.mktemp("stream")
    for name, number in (("one", 60), ("other", 40)):
        lines = [{"instruction": f"{name} {i}", "output": f"{name} answers {i} " * (1 + i % 4)} for i in range(number)]
        lines = [{"id": i} if i % 10 == 7 else line for i, line in enumerate(lines)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"llm": str(tiny_llm_path), "one": str(root / "one.jsonl"), "other": str(root / "other.jsonl")}


def write_config(folder: Path, setting, *, workers: int = 0, steps: int = STEPS) -> Path:
    folder.mkdir()
    path = folder / "config_of_run.py"
    path.write_text(CONFIG.format(**setting, out=str(folder / "run"), workers=workers, steps=steps))
    return path


def start(config: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmft", "train", str(config), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected, output
    return output


def weights(folder: Path):
    return load_file(folder / "final" / "llm_adapter" / "adapter_model.safetensors")


def metrics(folder: Path):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(m["step"], m["loss"], m["epoch"]) for m in lines]


def dropped(folder: Path):
    lines = map(json.loads, (folder / "dropped.jsonl").read_text().splitlines())
    return sorted((Path(line["source"]).stem, line["record"]) for line in lines)


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("runs") / "straight", setting)
    finish(start(config))
    return config.parent / "run"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_stream_ends_in_bitwise_the_same_weights(setting, straight, tmp_path, workers):
    config = write_config(tmp_path / "killed", setting, workers=workers)
    run = config.parent / "run"
    process = start(config)
    deadline = time.monotonic() + 200
    while not (run / "checkpoint-4" / "mmft.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "final").exists()
    output = finish(start(config, "--resume"))
    assert "going on from" in output
    assert metrics(run) == metrics(straight)
    expected, got = weights(straight), weights(run)
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert dropped(run) == dropped(straight)


def test_step_4_is_the_middle_of_a_pass_and_the_run_is_longer_than_one(straight):
    """What the test above relies on."""
    position = json.loads((straight / "checkpoint-12" / "stream.json").read_text())["position"]
    assert position["row"] > 0
    assert metrics(straight)[3][2] == 0
    assert metrics(straight)[-1][2] >= 1


def test_each_bad_record_is_listed_once_over_all_passes(straight):
    records = [("one", number) for number in range(8, 61, 10)] + [("other", number) for number in range(8, 41, 10)]
    assert dropped(straight) == records


def test_a_checkpoint_carries_its_position_under_its_manifest(straight):
    manifest = json.loads((straight / "checkpoint-12" / "mmft.json").read_text())
    assert "stream.json" in manifest["files"]


def test_nothing_is_kept_on_disk_beside_the_run(straight):
    assert not list(straight.parent.rglob("tokens-*"))
    assert not list(straight.parent.rglob("*.bin"))


def test_too_many_bad_records_end_a_stream_with_one_line_and_exit_2(setting, tmp_path):
    config = write_config(tmp_path / "bad", setting)
    output = finish(start(config, "--set", "data.max_bad_fraction=0.05"), expected=2)
    assert "Traceback" not in output
    assert "dropped 10 of the 100 records read; at most 5.0% is allowed (data.max_bad_fraction)" in output

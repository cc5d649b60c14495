"""Real runs with real trackers; W&B, SwanLab and MLflow where they are installed, without a network."""

import json
import os
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmft import hookimpl
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, override, use
from mmft.errors import MmftError
from mmft.plugins import load_plugins
from mmft.train.run import train

STEPS = 4


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_llm_path) -> TrainConfig:
    root = tmp_path_factory.mktemp("tracked")
    for name in "ab":
        turns = [[{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": f"{name} {i}"}] for i in range(8)]
        (root / f"{name}.json").write_text(json.dumps([{"conversations": turn} for turn in turns]), "utf-8")
    sources = [use("json", path=str(root / f"{name}.json")) for name in "ab"]
    return TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path), trainable=True)),
        data=Data(
            datasets=tuple(Dataset(source=source, data_map="llava") for source in sources), chat_template="chatml",
            max_length=128,
        ),
        optim=Optim(lr=1e-3, max_steps=STEPS, batch_size_per_device=4),
        runtime=Runtime(
            output_dir=root / "run", cache_dir=root / "cache", device="cpu", precision="fp32", save_steps=2,
            logging_steps=1,
        ),
    )  # fmt: skip


@pytest.fixture
def tracked(setting, tmp_path, monkeypatch):
    """`tracked("wandb")`: the setting in a folder of its own, told to trackers that keep everything in it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")

    def tracked(*names: str) -> TrainConfig:
        return override(setting, {"runtime.report_to": names, "runtime.output_dir": str(tmp_path / "run")})

    return tracked


def tensorboard_steps(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def wandb_steps(folder: Path) -> list[tuple[int, float]]:
    """Of all files of the one run, the earlier one's where two have a step, as W&B keeps it."""
    from wandb.proto import wandb_internal_pb2

    found: dict[int, float] = {}
    ids = set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert "optim" in {item.key for item in record.run.config.update}
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in items:
                found.setdefault(record.history.step.num, items["train/loss"])
    assert len(ids) == 1
    return sorted(found.items())


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KB, pieces of [checksum, length, kind]."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def swanlab_steps(folder: Path) -> list[tuple[int, float]]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    found: dict[int, float] = {}
    for path in sorted(folder.glob("swanlab/run-*/run-*.swanlab")):
        for data in log_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("scalar") and record.scalar.key == "train/loss":
                found.setdefault(record.scalar.step, record.scalar.value.number)
    return sorted(found.items())


def mlflow_steps(folder: Path) -> list[tuple[int, float]]:
    import mlflow

    client = mlflow.MlflowClient()
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001"
    assert "train/loss_by_dataset/a" in run.data.metrics
    return sorted({(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")})


READERS = {
    "tensorboard": tensorboard_steps, "wandb": wandb_steps, "swanlab": swanlab_steps, "mlflow": mlflow_steps,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_each_loss_arrives_at_its_step_once_and_a_resumed_run_goes_on_in_the_same(name, tracked, plugins):
    pytest.importorskip(name, reason=f"{name} is not among what the tests install")
    config = tracked(name)
    folder = config.runtime.output_dir
    assert train(config, plugins) == 0
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    assert train(config, plugins, resume=True) == 0
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    expected = [(line["step"], pytest.approx(line["loss"], rel=1e-5)) for line in told]
    assert [step for step, _ in expected] == [1, 2, 3, 4]
    assert READERS[name](folder) == expected


def test_trackers_change_no_weight(tracked, plugins):
    names = [name for name in READERS if name == "tensorboard" or has(name)]
    results = []
    for chosen in ([], names):
        config = tracked(*chosen)
        assert train(config, plugins, overwrite=True) == 0
        results.append(load_file(config.runtime.output_dir / "final" / "llm" / "model.safetensors"))
    assert all((results[0][key] == results[1][key]).all() for key in results[0])


def has(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def test_a_tracker_that_cannot_begin_costs_one_line_and_not_the_run(tracked, plugins):
    config = tracked("tensorboard")
    folder = config.runtime.output_dir
    folder.mkdir()
    (folder / "tensorboard").write_text("a file where a folder is to be", "utf-8")
    assert train(config, plugins) == 0
    said = (folder / "run.log").read_text("utf-8")
    assert said.count("WARNING tensorboard could not be started: ") == 1
    assert len((folder / "metrics.jsonl").read_text("utf-8").splitlines()) == STEPS


def test_a_tracker_without_a_login_costs_one_line_and_not_the_run(tracked, plugins, monkeypatch, tmp_path):
    pytest.importorskip("swanlab", reason="swanlab is not among what the tests install")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWANLAB_MODE", "online")
    config = tracked("swanlab")
    assert train(config, plugins) == 0
    said = (config.runtime.output_dir / "run.log").read_text("utf-8")
    assert said.count("WARNING swanlab could not be started: ") == 1


def at_step(step, act):
    """The plugins, and one more that acts at a step."""

    class Acting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                act()

    module = ModuleType("acting")
    module.mmft_callbacks = hookimpl(lambda config: [Acting()])
    return load_plugins([module])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_stops_with_every_tracker_open(number, tracked):
    names = [name for name in READERS if has(name)]
    config = tracked(*names)
    assert train(config, at_step(3, lambda: os.kill(os.getpid(), number))) == 128 + number
    assert (config.runtime.output_dir / "checkpoint-4").is_dir()
    assert "without it" not in (config.runtime.output_dir / "run.log").read_text("utf-8")


def test_a_run_that_fails_is_a_failed_one_in_mlflow(tracked):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not among what the tests install")

    def fail():
        raise MmftError("enough")

    with pytest.raises(MmftError):
        train(tracked("mlflow"), at_step(3, fail))
    client = mlflow.MlflowClient()
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FAILED"


def test_a_store_that_breaks_on_the_way_costs_one_line_and_not_the_run(tracked, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not among what the tests install")
    config = tracked("mlflow")
    assert train(config, at_step(2, lambda: (tmp_path / "mlflow.db").write_bytes(b"no database"))) == 0
    said = (config.runtime.output_dir / "run.log").read_text("utf-8")
    assert said.count("WARNING mlflow failed at step 2") + said.count("WARNING mlflow failed at step 3") == 1

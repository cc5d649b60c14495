"""Real runs of `mmft train` on tiny models, small enough to learn a few answers by heart in seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmft.testing import tiny_llm, tiny_vision

HTML = '<img src=x onerror="window.ran=1"><script>window.ran=1</script>\n    <b>4 spaces</b>'
ANSWERS = {
    "Say hello.": "Hello there.",
    "Again?": "Again what?",
    "What is it?": "I see nothing.",
    "Write HTML.": HTML,
    "Paint.": "\x1b[31mred",
    "Count.": " ".join(["1 2 3 4 5 6 7 8 9 0"] * 15),
}
AGAIN = "Again?", "Hello again."  # the answer after "Say hello.", which shows that the model was told of it
SEEN = "What is it?", "A picture."

CONFIG = """
from pathlib import Path
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use

folder = Path({folder!r})
vision = Vision(
    encoder=use("clip", path=str(folder / "clip"), select_layer=-2, pad_to_square=True),
    projector=use("mlp2x_gelu"),
)
config = TrainConfig(
    model=Model(llm=LLM(path=str(folder / "llm"), trainable=True), vision=vision if {sees} else None),
    data=Data(
        datasets=(
            Dataset(source=use("json", path=str(folder / "data.json")), data_map="llava", image_folder=folder),
        ),
        chat_template="chatml",
        max_length=512,
    ),
    optim=Optim(lr=6e-3, epochs=70, batch_size_per_device=8, warmup_ratio=0.1),
    runtime=Runtime(output_dir=folder / "run", device="cpu", precision="fp32", save_steps=1000),
)
"""


def run_mmft(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "mmft", *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=400, env=quiet_environment(), **options,
    )  # fmt: skip


def quiet_environment() -> dict[str, str]:
    """The environment of a machine without network, compiled files kept from one process to the next."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    cache = str(Path(gettempdir()) / "mmft-tests-pycache")  # without compiled files torch takes 15 s longer to import
    return {**environment, "PYTHONPYCACHEPREFIX": cache, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}


def train_tiny(folder: Path, *, sees: bool) -> Path:
    """Write models, data and a config into a folder, train until the answers are known by heart, return the run."""
    tiny_llm(folder / "llm", width=64)
    records = [conversation(question, answer) for question, answer in ANSWERS.items()]
    records.append(conversation("Say hello.", ANSWERS["Say hello."], *AGAIN))
    if sees:
        tiny_vision(folder / "clip")
        Image.new("RGB", (40, 30), "red").save(folder / "red.png")
        records.append({"image": "red.png", **conversation(f"<image>\n{SEEN[0]}", SEEN[1])})
    short = [record for record in records if len(json.dumps(record)) < 300]  # a long answer drowns them in the mean
    (folder / "data.json").write_text(json.dumps(records + 2 * short), "utf-8")
    (folder / "tiny.py").write_text(CONFIG.format(folder=str(folder), sees=sees), "utf-8")
    result = run_mmft("train", folder / "tiny.py")
    assert result.returncode == 0, result.stdout + result.stderr
    last = json.loads((folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["loss"] < 0.1, f"the tiny model did not learn its answers: {last}"
    return folder / "run"


def conversation(*turns: str) -> dict[str, object]:
    """A record of the `llava` data map: question, answer, question, answer."""
    speakers = ("human", "gpt") * (len(turns) // 2)
    return {"conversations": [{"from": f, "value": value} for f, value in zip(speakers, turns, strict=True)]}


@pytest.fixture
def mmft() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`mmft("chat", run, "-m", "Hi", input=...)`: the command line in a process of its own, whole result."""
    return run_mmft


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of such a process, for tests that start one themselves."""
    return quiet_environment()


@pytest.fixture
def answers() -> dict[str, str]:
    """What the tiny runs answer to a first question without a picture."""
    return dict(ANSWERS)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model that sees; its folder's parent has red.png, which it was trained on."""
    return train_tiny(tmp_path_factory.mktemp("sees"), sees=True)


@pytest.fixture(scope="session")
def tiny_text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a text model."""
    return train_tiny(tmp_path_factory.mktemp("text"), sees=False)


class Training:
    """`mmft train` in processes of its own, which a test can kill."""

    def start(self, config: Path, *options: str, ranks: int = 1) -> subprocess.Popen[str]:
        """Begin a run; several ranks are processes of torchrun, on this machine's CPU."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "mmft", "train", str(config), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**quiet_environment(), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], expected: int = 0) -> str:
        """Wait for the end, which must have this exit code; returns what was printed."""
        output, _ = process.communicate(timeout=900)
        assert process.returncode == expected, output
        return output

    def run(self, config: Path, *options: str, expected: int = 0, ranks: int = 1) -> str:
        """Both of these."""
        return self.finish(self.start(config, *options, ranks=ranks), expected)

    def wait_for(self, process: subprocess.Popen[str], path: Path) -> None:
        """Until a run has written a file."""
        deadline = time.monotonic() + 400
        while not path.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill_at(self, config: Path, step: int) -> None:
        """Begin a run in `run` beside its config, and kill it when the checkpoint of a step is there."""
        process = self.start(config)
        self.wait_for(process, config.parent / "run" / f"checkpoint-{step}" / "mmft.json")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (config.parent / "run" / "final").exists()

    def weights(self, run: Path) -> dict[str, torch.Tensor]:
        """Of everything small that a finished run has trained."""
        found = {}
        for name in ("projector.safetensors", "llm_adapter/adapter_model.safetensors"):
            path = run / "final" / name
            found |= load_file(path) if path.is_file() else {}
        return found

    def metrics(self, run: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="session")
def training() -> Training:
    """Runs that can be killed and resumed."""
    return Training()

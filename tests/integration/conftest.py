"""Real runs of `mmft train` on tiny models, small enough to learn a few answers by heart in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmft.testing import tiny_llm, tiny_vision

HTML = '<img src=x onerror="window.ran=1"><script>window.ran=1</script>\n    <b>4 spaces</b>'
COUNT = " ".join(str(number) for number in range(10, 80))
ANSWERS = {"Say hello.": "Hello there.", "Write HTML.": HTML, "Count.": COUNT}
AGAIN = "Again?", "Hello again."  # what is answered as a second turn, so that a test sees whether history is there
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
    optim=Optim(lr=8e-3, epochs=60, batch_size_per_device=8, warmup_ratio=0.1),
    runtime=Runtime(output_dir=folder / "run", device="cpu", precision="fp32", save_steps=1000),
)
"""


def mmft(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "mmft", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=quiet_environment(), **options,
    )  # fmt: skip


def quiet_environment() -> dict[str, str]:
    """The environment of a machine without network, on two cores."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}


def train_tiny(folder: Path, *, sees: bool) -> Path:
    """Write models, data and a config into a folder, train, and return the run."""
    tiny_llm(folder / "llm", width=64)
    records = [[("human", question), ("gpt", answer)] for question, answer in ANSWERS.items()]
    for first in ("Say hello.", "Write HTML."):
        turns = (first, ANSWERS[first], *AGAIN)
        records.append(list(zip(("human", "gpt") * 2, turns, strict=True)))
    data: list[dict[str, object]] = [{"conversations": [{"from": f, "value": v} for f, v in turns]} for turns in records]
    if sees:
        tiny_vision(folder / "clip")
        Image.new("RGB", (40, 30), "red").save(folder / "red.png")
        question, answer = SEEN
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        data += [{"image": "red.png", "conversations": turns}] * 2
    (folder / "data.json").write_text(json.dumps(data), "utf-8")
    (folder / "tiny.py").write_text(CONFIG.format(folder=str(folder), sees=sees), "utf-8")
    result = mmft("train", folder / "tiny.py")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model that sees; its folder's parent has red.png, which it was trained on."""
    return train_tiny(tmp_path_factory.mktemp("sees"), sees=True)


@pytest.fixture(scope="session")
def tiny_text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a text model."""
    return train_tiny(tmp_path_factory.mktemp("text"), sees=False)

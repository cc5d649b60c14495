"""kill -9 at any moment, also in the middle of a save, and what else can go wrong with a checkpoint.

The runs are children of one process (fork_runs.py), so that twenty kills take a minute.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from safetensors.torch import load_file

KILLS = 5  # of each of the four kinds of run
CONFIG = """
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use

vision = Vision(encoder=use("clip", path={clip!r}), projector=use("mlp2x_gelu"), lora=Lora(r=2, dropout=0.1))
config = TrainConfig(
    model=Model(llm=LLM(path={llm!r}, lora=Lora(r=4, alpha=8, dropout=0.2)), vision=vision if {sees} else None),
    data=Data(
        datasets=(
            Dataset(source=use("json", path={data!r}), data_map="llava", image_folder={images!r} if {sees} else None),
        ),
        chat_template="chatml",
        max_length=128,
        packing={packing},
    ),
    optim=Optim(lr=1e-2, epochs={epochs}, accumulate=2),
    runtime=Runtime(output_dir={out!r}, save_steps=2, logging_steps=1, device="cpu"),
)
"""


@pytest.fixture(scope="module")
def fork(environment: dict[str, str]) -> Iterator[Callable[..., dict[str, Any]]]:
    """`fork(["train", ...], kill_in_save=3)`: a run in a child of a process that has imported everything."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_runs.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdin and server.stdout

    def run(arguments: list[str], **request: Any) -> dict[str, Any]:
        server.stdin.write(json.dumps({"arguments": arguments, **request}) + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    yield run
    server.stdin.close()
    server.wait(timeout=600)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_llm_path: Path, tiny_clip_path: Path) -> dict[str, Any]:
    """Twelve pictures with a question each, and four questions without."""
    root = tmp_path_factory.mktemp("kill")
    pictures, texts = [], []
    for i in range(16):
        PILImage.new("RGB", (20 + i, 30), (i * 15, 90, 200 - i * 10)).save(root / f"{i}.png")
        text = [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": f"number {i}"}]
        seen = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": f"number {i}"}]
        texts.append({"conversations": text})
        pictures.append({"image": f"{i}.png", "conversations": seen} if i % 4 != 3 else texts[-1])
    (root / "texts.json").write_text(json.dumps(texts), "utf-8")
    (root / "pictures.json").write_text(json.dumps(pictures), "utf-8")
    return {"llm": str(tiny_llm_path), "clip": str(tiny_clip_path), "images": str(root)}


def write_config(folder: Path, setting: dict[str, Any], *, sees: bool, packing: bool, epochs: int = 2) -> Path:
    folder.mkdir()
    data = str(Path(setting["images"]) / ("pictures.json" if sees else "texts.json"))
    values = {**setting, "data": data, "sees": sees, "packing": packing, "epochs": epochs, "out": str(folder / "run")}
    (folder / "config_of_run.py").write_text(CONFIG.format(**values), "utf-8")
    return folder / "config_of_run.py"


def weights(folder: Path) -> dict[str, Any]:
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("sees", [False, True], ids=["text", "llava"])
def test_a_run_killed_five_times_ends_in_bitwise_the_weights_of_one_never_killed(
    fork: Callable[..., dict[str, Any]], setting: dict[str, Any], tmp_path: Path, sees: bool, packing: bool
) -> None:
    epochs = 6 if packing else 2
    straight = write_config(tmp_path / "straight", setting, sees=sees, packing=packing, epochs=epochs)
    killed = write_config(tmp_path / "killed", setting, sees=sees, packing=packing, epochs=epochs)
    ended = fork(["train", str(straight)])
    assert ended["code"] == 0, ended["output"]
    chance = random.Random(f"{sees} {packing}")
    run = killed.parent / "run"
    kills, in_saves, resume = 0, 0, []
    while kills < KILLS:
        in_save = kills % 2 == 0
        how = {"kill_in_save": chance.randint(1, 60)} if in_save else {"kill_after": chance.uniform(0, 0.4)}
        ended = fork(["train", str(killed), *resume], metrics=str(run / "metrics.jsonl"), **how)
        assert ended["code"] in (0, -signal.SIGKILL), ended["output"]
        if ended["code"] == 0:  # it was quicker than the kill: begin this one anew
            shutil.rmtree(run)
        kills += ended["code"] != 0
        in_saves += in_save and ended["code"] != 0
        resume = ["--resume"] if list(run.glob("checkpoint-*/mmft.json")) else ["--overwrite"]
    ended = fork(["train", str(killed), *resume])
    assert ended["code"] == 0, ended["output"]
    assert in_saves >= 2
    assert losses(run) == losses(straight.parent / "run")
    expected, got = weights(straight.parent / "run" / "final"), weights(run / "final")
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert not list(run.glob(".*"))  # nothing unfinished is left lying about


@pytest.fixture(scope="module")
def stopped(fork: Callable[..., dict[str, Any]], setting: dict[str, Any], tmp_path_factory: Any) -> Path:
    """The config of a run with its two newest checkpoints and without its end."""
    config = write_config(tmp_path_factory.mktemp("stopped") / "here", setting, sees=True, packing=False)
    ended = fork(["train", str(config)])
    assert ended["code"] == 0, ended["output"]
    shutil.rmtree(config.parent / "run" / "final")
    return config


@pytest.mark.parametrize("too_large", ["optimizer.pt", "projector.safetensors"])
def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_older_checkpoint(
    fork: Callable[..., dict[str, Any]], stopped: Path, tmp_path: Path, too_large: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped.parent / "run", run)
    newest, older = sorted(run.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    shutil.rmtree(newest)
    arguments = ["train", str(stopped), "--work-dir", str(run), "--resume"]
    ended = fork(arguments, largest_file=(older / too_large).stat().st_size - 1)
    assert ended["code"] == 2, ended["output"]
    last = ended["output"].strip().splitlines()[-1]
    assert "Traceback" not in ended["output"]
    assert f"{newest} cannot be written: " in last and f"{older} is whole: " in last and "--resume" in last
    assert not list(run.glob(".*")) and not newest.exists()
    assert fork(arguments)["code"] == 0


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "cut off" else content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["cut off", "one bit"])
@pytest.mark.parametrize("name", ["projector.safetensors", "optimizer.pt", "scheduler.pt", "mmft.json"])
def test_of_a_damaged_checkpoint_the_name_is_told_and_the_older_one_is_used(
    fork: Callable[..., dict[str, Any]], stopped: Path, tmp_path: Path, name: str, how: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped.parent / "run", run)
    newest, older = sorted(run.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    damage(newest / name, how)
    ended = fork(["train", str(stopped), "--work-dir", str(run), "--resume"])
    assert ended["code"] == 0, ended["output"]
    assert f"passed over: {newest}" in ended["output"] and name in ended["output"]
    assert f"going on from {older}" in ended["output"]


def test_a_checkpoint_of_another_config_is_refused_with_what_differs(
    fork: Callable[..., dict[str, Any]], stopped: Path
) -> None:
    ended = fork(["train", str(stopped), "--resume", "--set", "optim.lr=1e-3", "--set", "data.max_length=120"])
    assert ended["code"] == 2
    last = ended["output"].strip().splitlines()[-1]
    assert "optim.lr" in last and "data.max_length" in last and "0.01" in last
    for other in (["--seed", "7"], ["--set", "runtime.precision=bf16"]):
        ended = fork(["train", str(stopped), "--resume", *other])
        assert ended["code"] == 2 and "runtime." in ended["output"].strip().splitlines()[-1]


@pytest.mark.parametrize("last", ["data.num_workers=0", "optim.max_steps=8"])
def test_a_run_killed_after_its_last_checkpoint_only_writes_its_end(
    fork: Callable[..., dict[str, Any]], setting: dict[str, Any], tmp_path: Path, last: str
) -> None:
    config = write_config(tmp_path / "end", setting, sees=True, packing=False, epochs=1)
    run, arguments = config.parent / "run", ["train", str(config), "--set", last]
    assert fork(arguments)["code"] == 0
    before, lines = weights(run / "final"), losses(run)
    shutil.rmtree(run / "final")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut off while it was written
    ended = fork([*arguments, "--resume"])
    assert ended["code"] == 0, ended["output"]
    assert "step 9" not in ended["output"] and "finished at step 8" in ended["output"]
    after = weights(run / "final")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert [step for step, _ in lines] == list(range(1, 9))


def test_a_folder_that_cannot_be_made_is_one_line(fork: Callable[..., dict[str, Any]], stopped: Path) -> None:
    ended = fork(["train", str(stopped), "--work-dir", "/proc/nowhere"])
    assert ended["code"] == 2 and "Traceback" not in ended["output"]
    assert "/proc/nowhere cannot be written to" in ended["output"]


def test_a_checkpoint_of_another_plugin_version_is_refused_until_told_otherwise(
    fork: Callable[..., dict[str, Any]], stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped.parent / "run", run)
    for path in run.glob("checkpoint-*/mmft.json"):
        manifest = json.loads(path.read_text("utf-8"))
        owner = manifest["plugins"]["projector mlp2x_gelu"]
        manifest["plugins"]["projector mlp2x_gelu"] = owner.rpartition(" ")[0] + " 0.0.1"
        path.write_text(json.dumps(manifest), "utf-8")
    ended = fork(["train", str(stopped), "--work-dir", str(run), "--resume"])
    assert ended["code"] == 2
    last = ended["output"].strip().splitlines()[-1]
    assert "projector mlp2x_gelu" in last and "0.0.1" in last and "--allow-other-versions" in last
    ended = fork(["train", str(stopped), "--work-dir", str(run), "--resume", "--allow-other-versions"])
    assert ended["code"] == 0, ended["output"]
    assert "0.0.1" in ended["output"]


def test_the_only_good_checkpoint_outlives_newer_ones_that_failed(
    fork: Callable[..., dict[str, Any]], setting: dict[str, Any], tmp_path: Path
) -> None:
    """save_total_limit=1: the older one goes only when the new one is whole and under its name."""
    config = write_config(tmp_path / "one", setting, sees=False, packing=False, epochs=1)
    run = config.parent / "run"
    limit = ["--set", "runtime.save_total_limit=1"]
    resume: list[str] = []
    kills_with_one = 0
    for number in range(40, 130, 10):
        ended = fork(["train", str(config), *limit, *resume], kill_in_save=number)
        whole = list(run.glob("checkpoint-*/mmft.json"))
        assert whole or not kills_with_one, "the only good checkpoint is gone"
        if ended["code"] == 0:
            break
        assert ended["code"] == -signal.SIGKILL, ended["output"]
        kills_with_one += bool(whole)
        resume = ["--resume"] if whole else ["--overwrite"]
    assert kills_with_one >= 3

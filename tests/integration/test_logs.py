"""What a person sees of a run: the screen, metrics.jsonl, TensorBoard, samples and the report."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from mmft.config import (
    LLM,
    Data,
    Dataset,
    Evaluation,
    Model,
    Optim,
    Prompt,
    Runtime,
    TrainConfig,
    Vision,
    override,
    use,
)
from mmft.config.check import find_problems
from mmft.data.collate import Collator
from mmft.data.store import StoredSample
from mmft.modeling.loss import dataset_sums, token_losses, token_mean
from mmft.train.callbacks import metrics_line
from mmft.train.plot import draw, smoothed
from mmft.train.progress import DatasetLoss, Pace, Progress
from mmft.train.run import train


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_llm_path, tiny_clip_path) -> TrainConfig:
    root = tmp_path_factory.mktemp("logs")
    Image.new("RGB", (60, 40), "red").save(root / "red.png")
    (root / "later.png").write_bytes((root / "red.png").read_bytes())
    for name, word in (("words", "apple"), ("seen", "pear")):
        records = []
        for i in range(6):
            image = {"image": "red.png"} if name == "seen" else {}
            asked = "<image>\nWhat?" if image else f"Say {i}"
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"{word} {i} " * (i + 1)}]
            records.append({"conversations": turns, **image})
        (root / f"{name}.json").write_text(json.dumps(records), "utf-8")
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), trainable=True),
            vision=Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu")),
        ),
        data=Data(
            datasets=tuple(
                Dataset(source=use("json", path=str(root / f"{name}.json")), data_map="llava", image_folder=root)
                for name in ("words", "seen")
            ),
            chat_template="chatml",
            max_length=256,
            validation_share=0.2,
        ),
        optim=Optim(lr=1e-3, max_steps=4, batch_size_per_device=2),
        runtime=Runtime(
            output_dir=root / "run", device="cpu", precision="fp32", save_steps=2, logging_steps=1,
            evaluation=Evaluation(steps=2), report_to=("tensorboard",), sample_steps=2,
            samples=(Prompt(text="你好？<b>"), Prompt(text="What?", images=(root / "later.png",)),
                     Prompt(text="Bye", images=(root / "red.png",))),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(setting, plugins) -> Path:
    """A finished run; one of the pictures it is asked about breaks before the first step."""
    picture = setting.runtime.samples[1].images[0]
    shown = picture.read_bytes()
    log = logging.getLogger("mmft")

    def break_it(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("sample at step 0: Bye"):
            picture.write_bytes(b"no picture any more")
        return True

    log.addFilter(break_it)
    try:
        assert train(setting, plugins) == 0
    finally:
        log.removeFilter(break_it)
        picture.write_bytes(shown)
    return setting.runtime.output_dir


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_broken_picture_costs_one_sample_answer_and_never_the_run(run):
    first, second = (json.loads((run / "samples" / f"step-{n:07d}.json").read_text("utf-8")) for n in (0, 2))
    assert all("error" not in one for one in first)
    assert ["error" in one for one in second] == [False, True, False]
    assert "later.png" in second[1]["error"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-{n:07d}.json" for n in (0, 2, 4)]


def test_metrics_hold_speed_memory_and_the_loss_of_each_data_set(run):
    trained = [line for line in lines(run) if "loss" in line]
    for line in trained:
        assert {"tokens_per_second", "trained_tokens_per_second", "images_per_second", "memory_gb"} <= line.keys()
        assert line["tokens_per_second"] > line["trained_tokens_per_second"] > 0
        assert set(line["loss_by_dataset"]) <= {"words", "seen"}
        low, high = min(line["loss_by_dataset"].values()), max(line["loss_by_dataset"].values())
        assert low - 1e-5 <= line["loss"] <= high + 1e-5  # a token mean of them
    assert {name for line in trained for name in line["loss_by_dataset"]} == {"words", "seen"}


def test_tensorboard_has_speed_and_validation_loss(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {
        "train/loss",
        "train/tokens_per_second",
        "train/memory_gb",
        "train/loss/seen",
        "eval/loss",
        "eval/perplexity",
    }
    assert wanted <= tags, tags
    told = [(line["step"], line["validation_loss"]) for line in lines(run) if "validation_loss" in line]
    assert [event.step for event in events.Scalars("eval/loss")] == [step for step, _ in told] == [2, 4]
    assert events.Scalars("eval/loss")[1].value == pytest.approx(told[1][1], rel=1e-6)


def test_the_report_is_one_file_with_everything_in_it(run):
    page = (run / "report.html").read_text("utf-8")
    assert not re.search(r"""(?:src|href|srcset)\s*=\s*["'](?!data:)""", page), "an external request"
    for text in ("best validation loss", "held out for validation", "words", "projector", "你好？&lt;b&gt;",
                 "transformers", "a picture that cannot be read", "no answer:", "finished at step 4"):  # fmt: skip
        assert text in page, text
    assert page.count("data:image/png") >= 3  # curves for light and dark, and the asked picture
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_written_is_a_line_and_no_end(setting, run, caplog, tmp_path):
    from mmft.train.report import Facts, write_report

    (tmp_path / "report.html").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{broken", "utf-8")
    config = override(setting, {"runtime.output_dir": tmp_path})
    logging.getLogger("mmft").addHandler(caplog.handler)
    write_report(Facts(config, [], "", [], "cpu"), state="running")
    assert "report.html could not be written" in caplog.text


LINE = {"step": 2, "loss": 1.5, "lr": 1e-4, "tokens_per_second": 1200.0, "trained_tokens_per_second": 300.0,
        "images_per_second": 4.0, "memory_gb": 1.25, "seconds_left": 75.0}  # fmt: skip


class State:
    """What the screen reads of transformers' state."""

    global_step, max_steps, is_world_process_zero = 0, 8, True


def test_a_terminal_gets_one_bar_with_messages_above_it_and_is_left_as_it_was():
    terminal = io.StringIO()
    screen = Progress(Console(file=terminal, force_terminal=True, width=160))
    log, handler = logging.getLogger("mmft"), logging.StreamHandler(io.StringIO())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    own = handler.stream
    try:
        with screen.shown():
            screen.on_train_begin(None, State, None)
            log.info("[red]sample[/red] at step 2")
            screen.tell(LINE, 8)
        shown = terminal.getvalue()
    finally:
        log.removeHandler(handler)
    assert "[red]sample[/red] at step 2" in shown  # a message is text, not markup
    for text in ("loss 1.5000", "lr 1.00e-04", "1,200 tokens/s (300 trained, 4.0 images/s)", "1.25 GB", "1:15 left"):
        assert text in shown, text
    assert "step 2/8" not in shown, "the line of a step belongs into run.log; the bar says it"
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back
    assert handler.stream is own
    assert not handler.filters


def test_anything_but_a_terminal_gets_plain_lines():
    pipe = io.StringIO()
    handler, log = logging.StreamHandler(pipe), logging.getLogger("mmft")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        screen = Progress(Console(file=io.StringIO()))
        screen.on_train_begin(None, State, None)
        screen.tell(LINE, 8)
        screen.tell({"step": 2, "validation_loss": 1.0, "perplexity": 2.718}, 8)
    finally:
        log.removeHandler(handler)
    assert pipe.getvalue().splitlines() == [
        "step 2/8  loss 1.5000  lr 1.00e-04  1,200 tokens/s (300 trained, 4.0 images/s)  1.25 GB  1:15 left",
        "step 2/8  validation loss 1.0000, perplexity 2.72",
    ]


def test_every_rank_counts_and_pauses_do_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mmft.train.progress.time.monotonic", lambda: now[0])
    pace = Pace()
    pace.begin(4)
    now[0] = 3.0
    with pace.paused():
        now[0] = 9.0
    now[0] = 10.0
    told = pace.measure(8, 16, (400, 100, 8), lambda own: torch.stack([own, own]))
    assert (told["tokens_per_second"], told["trained_tokens_per_second"], told["images_per_second"]) == (200, 50, 4)
    assert told["seconds_left"] == 8.0  # 4 steps in 4 s, 8 to go


def test_losses_by_dataset_add_up_to_the_loss_and_change_nothing():
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 11, requires_grad=True)
    targets = torch.tensor([[1, -100, 3, 4, -100, 5]])
    places = torch.tensor([[0, 0, 2, 2, 2, 0]])
    losses = token_losses(logits, targets)
    told = {"loss": token_mean(losses, targets, 4), "dataset_sums": dataset_sums(losses, targets, places, 3)}
    plain = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum") / 4
    assert told["loss"].item() == pytest.approx(plain.item(), rel=1e-6)
    assert told["dataset_sums"][1].tolist() == [2, 0, 2]
    assert told["dataset_sums"][0].sum().item() / 4 == pytest.approx(plain.item(), rel=1e-6)
    assert not told["dataset_sums"].requires_grad
    sums = DatasetLoss(("a", "b", "c"))
    sums.add(told)
    sums.add(told)
    assert set(sums.means()) == {"loss/a", "loss/c"}
    assert sums.means() == {}


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_each_token_knows_its_dataset(layout):
    import numpy as np

    samples = [StoredSample(np.arange(n, dtype=np.int32), np.ones(n, bool), (), source, 1, 0)
               for n, source in ((2, "b"), (3, "a"))]  # fmt: skip
    batch = Collator(layout, datasets=("a", "b"), tells_origins=True)(samples)
    assert batch["dataset_ids"].tolist() == ([[1, 1, 0, 0, 0]] if layout == "flat" else [[1, 1, 1], [0, 0, 0]])
    assert batch["origins"] == (("b", 1, 2), ("a", 1, 3))


def test_numbers_that_json_has_no_word_for_are_null():
    line = metrics_line(1, 0.0, {"loss": 1.0, "grad_norm": float("inf")})
    from mmft.train.callbacks import _strict

    assert json.loads(json.dumps({key: _strict(value) for key, value in line.items()}))["grad_norm"] is None


def test_a_reporter_that_is_not_installed_is_one_line_before_a_weight_is_read(setting, plugins):
    config = override(setting, {"runtime.report_to": ("swanlab",)})
    found = [str(problem) for problem in find_problems(config, plugins)]
    assert found == ["runtime.report_to: swanlab is not installed; pip install swanlab"]


def test_curves_can_be_drawn_of_little_and_of_odd_metrics():
    assert draw([LINE | {"grad_norm": None, "loss": None}]).startswith(b"\x89PNG")
    assert smoothed([2.0, float("nan"), 2.0]) == pytest.approx([2.0, 2.0, 2.0])

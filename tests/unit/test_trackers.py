"""What trackers are told, what is kept from them, and that none of them costs a run."""

import json
import logging
import signal
import sys
from types import SimpleNamespace

import pytest

from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, use
from mmft.config.check import find_problems
from mmft.train.trackers import HIDDEN, IDS, Reporting, flattened, public, read_ids

LINE = {"loss": 1.5, "learning_rate": 1e-3, "loss/a": 1.25}


def config_in(folder, **options) -> TrainConfig:
    return TrainConfig(
        model=Model(llm=LLM(path="llm", trainable=True)),
        data=Data(
            datasets=(Dataset(source=use("json", path="a.json", **options), data_map="llava"),),
            chat_template="chatml", max_length=64,
        ),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=folder),
    )  # fmt: skip


class Noting:
    """A tracker that notes what it is told, and fails where it is to."""

    def __init__(self, fails: str = "", error: BaseException | None = None, run_id: str | None = "own"):
        self.told: list[tuple] = []
        self.fails, self.error, self.run_id = fails, error or RuntimeError("no more\nof it"), run_id

    def begin(self, about):
        self._note("begin", about)
        return about.run_id or self.run_id

    def log(self, values, step):
        self._note("log", step, values)

    def end(self, *, failed):
        self._note("end", failed)

    def _note(self, what, *more):
        if what == self.fails:
            raise self.error
        self.told.append((what, *more))


def run(reporting, *steps, error: Exception | None = None):
    """What a training does with it: begin, a line each step, an end."""
    with reporting.closed():
        reporting.on_train_begin(None, SimpleNamespace(global_step=0), None)
        for step in steps:
            reporting.on_log(None, SimpleNamespace(global_step=step), None, logs=dict(LINE))
        if error:
            raise error


def test_numbers_of_training_and_validation_are_told_and_nothing_else(tmp_path):
    tracker = Noting()
    reporting = Reporting({"x": tracker}, config_in(tmp_path))
    for logs in (LINE, {"eval_loss": 2.0, "eval_loss/a": 2.5}, {"train_runtime": 1.0, "train_loss": 9.0}, None):
        reporting.on_log(None, SimpleNamespace(global_step=3), None, logs=logs)
    assert tracker.told == [
        ("log", 3, {"train/loss": 1.5, "train/learning_rate": 1e-3, "train/loss/a": 1.25}),
        ("log", 3, {"eval/loss": 2.0, "eval/loss/a": 2.5}),
    ]


@pytest.mark.parametrize("error", [RuntimeError("no more\nof it"), SystemExit("no more"), KeyError("no more")])
@pytest.mark.parametrize("fails", ["begin", "log", "end"])
def test_a_tracker_that_fails_is_told_in_one_line_and_the_others_go_on(tmp_path, caplog, fails, error):
    broken, whole = Noting(fails, error), Noting()
    with caplog.at_level(logging.WARNING, "mmft"):
        run(Reporting({"broken": broken, "whole": whole}, config_in(tmp_path)), 1, 2)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("broken ")
    assert "no more" in message
    assert message.endswith("the run goes on without it")
    assert "\n" not in message
    assert [what for what, *_ in whole.told] == ["begin", "log", "log", "end"]
    assert [what for what, *_ in broken.told] == {"begin": [], "log": ["begin"], "end": ["begin", "log", "log"]}[fails]


def test_an_interruption_is_no_failure_of_a_tracker(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Reporting({"x": Noting("log", KeyboardInterrupt())}, config_in(tmp_path)), 1)


def test_a_training_that_fails_closes_its_runs_as_failed(tmp_path):
    tracker = Noting()
    with pytest.raises(ValueError, match="nan"):
        run(Reporting({"x": tracker}, config_in(tmp_path)), 1, error=ValueError("nan"))
    assert tracker.told[-1] == ("end", True)
    run(Reporting({"x": tracker}, config_in(tmp_path)), 1)
    assert tracker.told[-1] == ("end", False)


def test_ctrl_c_stays_with_the_training_whatever_a_tracker_installs(tmp_path):
    class Greedy(Noting):
        def begin(self, about):
            signal.signal(signal.SIGINT, lambda *_: None)
            return super().begin(about)

    before = signal.getsignal(signal.SIGINT)
    Reporting({"x": Greedy()}, config_in(tmp_path)).on_train_begin(None, None, None)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_resumed_training_names_the_run_it_goes_on_with_and_a_new_one_does_not(tmp_path):
    trackers = [Noting(run_id="first"), Noting(run_id="never"), Noting(run_id="second")]
    for tracker, start in zip(trackers, (0, 7, 0), strict=True):
        run(Reporting({"x": tracker}, config_in(tmp_path), start_step=start), start + 1)
    abouts = [tracker.told[0][1] for tracker in trackers]
    assert [(about.run_id, about.step) for about in abouts] == [(None, 0), ("first", 7), (None, 0)]
    assert read_ids(tmp_path / IDS) == {"x": "second"}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"x": 1}'])
def test_damaged_notes_of_earlier_runs_begin_new_ones(tmp_path, content):
    (tmp_path / IDS).write_bytes(content)
    assert read_ids(tmp_path / IDS) == {}


def test_a_config_is_told_without_what_looks_like_a_secret(tmp_path):
    secret = "s3cr3t" + 20 * "x"
    config = config_in(
        tmp_path, token=secret, api_key=secret, headers={"auth_token": secret}, url=f"https://me:{secret}@host/a",
        note=f"with hf_{secret}", names=[f"sk-{secret}"], image_token_count=4, new_tokens=["<a>"],
    )  # fmt: skip
    told = public(config)
    assert "s3cr3t" not in json.dumps(told)
    source = told["data"]["datasets"][0]["source"]
    assert source["url"] == f"https://{HIDDEN}@host/a"
    assert source["note"] == f"with {HIDDEN}"
    assert (source["image_token_count"], source["new_tokens"], source["path"]) == (4, ["<a>"], "a.json")
    assert told["optim"]["lr"] == 1e-3


def test_a_config_is_flattened_to_its_leaves(tmp_path):
    told = dict(flattened(public(config_in(tmp_path))))
    assert told["optim.lr"] == "0.001"
    assert told["data.datasets.0.source.path"] == "a.json"
    assert dict(flattened({"a": [], "b": {"ü ?": None}})) == {"b.ü _": "None"}


def test_a_folder_that_has_the_name_of_a_tracker_is_not_its_package(tmp_path, monkeypatch, plugins):
    (tmp_path / "swanlab").mkdir()  # W&B, for one, makes a folder of its own name where it is run
    monkeypatch.setattr(sys, "path", [str(tmp_path)] + [p for p in sys.path if "trackers" not in p])
    config = config_in(tmp_path)
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"report_to": ("swanlab",)})})
    found = [str(problem) for problem in find_problems(config, plugins)]
    assert "runtime.report_to: swanlab is not installed; pip install swanlab" in found

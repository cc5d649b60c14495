"""Where the metrics go beside metrics.jsonl: TensorBoard, W&B, SwanLab and MLflow, each through its own package.

transformers brings callbacks for all of them, but those record transformers' arguments instead of the config, begin a
new run at a resume, and end the training where the tracker fails (SwanLab's, of transformers 5.23, always does under
swanlab 0.10: it asks for a run before there is one).
"""

import importlib
import json
import logging
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from mmft.config import TrainConfig
from mmft.config.load import dump_config

log = logging.getLogger("mmft")
IDS = "trackers.json"  # in the run's folder: which run of each tracker a resumed training goes on with
PROJECT = "mmft"
HIDDEN = "***"
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_key|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"(?<=://)[^/@\s]+(?=@)|\b(hf_|sk-)[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run. `run_id` is its own name of the run that is gone on with, after `step`."""

    folder: Path
    config: Mapping[str, Any]
    step: int = 0
    run_id: str | None = None


class Tracker(Protocol):
    """One of them. Whatever it raises turns it off and is told; the training goes on."""

    def begin(self, about: About) -> str | None:
        """Open a run, or go on with one; returns what to go on with next time."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of a step; a step may come twice, with other names."""

    def end(self, *, failed: bool) -> None:
        """Close the run; everything is written or sent."""


class TensorBoard:
    """Event files in `tensorboard/`. What a resumed run writes again is not shown twice."""

    def begin(self, about: About) -> str | None:
        """Open a file."""
        from torch.utils.tensorboard import SummaryWriter

        again = about.step + 1 if about.step else None
        self._writer = SummaryWriter(log_dir=str(about.folder / "tensorboard"), purge_step=again)
        self._writer.add_text("config", f"```json\n{json.dumps(about.config, indent=2, ensure_ascii=False)}\n```")
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A point a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """https://docs.wandb.ai/models/ref/python/functions/init; its WANDB_ variables go before what is chosen here."""

    def begin(self, about: About) -> str | None:
        """Open a run; offline a resumed one is a folder more with the same id, which `wandb sync` puts together."""
        chosen = {
            "project": PROJECT, "name": about.folder.name, "dir": str(about.folder),
            "run_id": about.run_id, "resume": "allow",
        }  # fmt: skip
        options = {key: value for key, value in chosen.items() if f"WANDB_{key.upper()}" not in os.environ}
        if "run_id" in options:
            options["id"] = options.pop("run_id")
        self._run = importlib.import_module("wandb").init(config=dict(about.config), **options)
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A row; of a step that was told before the resume W&B keeps the first one."""
        self._run.log(dict(values), step=step)

    def end(self, *, failed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=1 if failed else 0)


class SwanLab:
    """https://docs.swanlab.cn/en/api/py-init.html; its SWANLAB_ variables go before what is chosen here."""

    def begin(self, about: About) -> str | None:
        """Open a run."""
        chosen = {
            "project": (PROJECT, "PROJECT_NAME", "PROJ_NAME"),
            "name": (about.folder.name, "EXPERIMENT_NAME", "EXP_NAME"),
            "log_dir": (str(about.folder / "swanlab"), "LOG_DIR", "LOGDIR"),
        }
        options = {
            key: value for key, (value, *names) in chosen.items() if not {f"SWANLAB_{n}" for n in names} & {*os.environ}
        }
        if about.run_id and "SWANLAB_RUN_ID" not in os.environ:
            options |= {"id": about.run_id, "resume": "allow"}
        self._run = importlib.import_module("swanlab").init(config=dict(about.config), **options)
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A point a value."""
        self._run.log(dict(values), step=step)

    def end(self, *, failed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish("crashed", error="the training failed") if failed else self._run.finish()


class MLflow:
    """https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html; MLFLOW_ variables as they are there.

    Through the client, which keeps no run of the process to be closed at its exit.
    """

    def begin(self, about: About) -> str | None:
        """Open a run with the config as its parameters, or go on with one, whose parameters cannot change."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 are four minutes before a dead server is told
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        mlflow = importlib.import_module("mlflow")
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        self._id = os.environ.get("MLFLOW_RUN_ID") or about.run_id
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        self._id = self._client.create_run(self._experiment(), run_name=about.folder.name).info.run_id
        told = [self._entities.Param(key, value[:6000]) for key, value in flattened(about.config)]
        for first in range(0, len(told), 100):  # the server takes no more at once
            self._client.log_batch(self._id, params=told[first : first + 100])
        return self._id

    def _experiment(self) -> str:
        if found := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return found
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self._client.get_experiment_by_name(name)
        return str(existing.experiment_id if existing else self._client.create_experiment(name))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A point a value. In a store of files `loss` cannot be a metric and a folder of metrics at once."""
        now = int(time.time() * 1000)
        names = {re.sub(r"^(train|eval)/loss/", r"\1/loss_by_dataset/", name): name for name in values}
        points = [
            self._entities.Metric(re.sub(r"[^\w\-. :/]", "_", name), values[told], now, step)
            for name, told in names.items()
        ]
        self._client.log_batch(self._id, metrics=points)

    def end(self, *, failed: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "swanlab": SwanLab, "mlflow": MLflow,
}  # fmt: skip


def trackers(names: Sequence[str]) -> dict[str, Tracker]:
    """Those that `runtime.report_to` names; nothing is imported before they begin."""
    return {name: TRACKERS[name]() for name in names}


class Reporting(TrainerCallback):  # type: ignore[misc]
    """Tells every tracker; one that fails is left out from then on. `start_step` is the one a resumed run stands at."""

    def __init__(self, trackers: Mapping[str, Tracker], config: TrainConfig, *, start_step: int = 0) -> None:
        self._trackers = dict(trackers)
        self._config, self._folder, self._start = config, config.runtime.output_dir, start_step
        self._begun: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the runs, and note which they are."""
        if not self._trackers:
            return
        before = read_ids(self._folder / IDS) if self._start else {}
        config, ids = public(self._config), dict(before)
        for name, tracker in list(self._trackers.items()):
            about = About(self._folder, config, self._start, before.get(name))
            with self._guarded(name, "could not be started"):
                if (found := tracker.begin(about)) is not None:
                    ids[name] = found
                self._begun.append(name)
        with self._guarded("", f"{IDS} could not be written"):
            (self._folder / IDS).write_text(json.dumps(ids, indent=2), "utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Pass on the numbers of a training line or a validation line; the closing summary is neither."""
        if not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        values = {name: float(value) for name, value in rewrite_logs(logs).items() if isinstance(value, int | float)}
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name, f"failed at step {state.global_step}"):
                tracker.log(values, state.global_step)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Close what was opened, at an end or a failure of the training within."""
        failed = True
        try:
            yield
            failed = False
        finally:
            for name in self._begun:
                if name in self._trackers:
                    with self._guarded(name, "could not be closed"):
                        self._trackers[name].end(failed=failed)

    @contextmanager
    def _guarded(self, name: str, what: str) -> Iterator[None]:
        """Tell a failure in one line, with the tracker left out; keep Ctrl-C and SIGTERM ours (SwanLab takes one)."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except (Exception, SystemExit) as error:  # what counts is the run, and metrics.jsonl has the same numbers
            self._trackers.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
            log.warning("%s %s: %s; the run goes on without it", name, what, reason)
            log.debug("its traceback", exc_info=True)
        finally:
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


def read_ids(path: Path) -> dict[str, str]:
    """The runs to go on with; none where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def public(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values without what looks like a secret, in an option's name, a URL or a token's form."""
    cleaned: dict[str, Any] = _without_secrets(json.loads(dump_config(config)))
    return cleaned


def _without_secrets(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if isinstance(value, str):
        return HIDDEN if SECRET_KEY.search(key) else SECRET_VALUE.sub(HIDDEN, value)
    return value


def flattened(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`optim.lr` and its value as text, for each leaf; an empty part has none."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield re.sub(r"[^\w\-. :/]", "_", path), str(value)
        return
    for key, item in items:
        yield from flattened(item, f"{path}.{key}" if path else str(key))

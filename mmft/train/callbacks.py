"""What happens beside the steps: metrics, sample chat, and an orderly end when somebody asks for it."""

import json
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from mmft.config import Prompt
from mmft.inference import Assistant, Generation, user_message
from mmft.train.progress import Pace, Progress
from mmft.types import Conversation

log = logging.getLogger("mmft")
SPEEDS = ("tokens_per_second", "trained_tokens_per_second", "images_per_second", "seconds", "seconds_left", "memory_gb")


class Metrics(TrainerCallback):  # type: ignore[misc]
    """A line of metrics.jsonl, and of the screen, for each logging step and each evaluation."""

    def __init__(self, path: Path, screen: Progress, pace: Pace, *, start_step: int = 0) -> None:
        self._path, self._screen, self._pace, self._start = path, screen, pace, start_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock when everything is loaded and the first samples are asked; a resumed run's goes on."""
        before = keep_until(self._path, self._start) if state.is_world_process_zero else 0.0
        self._pace.begin(state.global_step, before)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line; the closing summary of transformers is not one."""
        line = metrics_line(state.global_step, state.epoch or 0.0, logs or {})
        if line is None or not state.is_world_process_zero:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _strict(value) for key, value in line.items()}, ensure_ascii=False) + "\n")
        self._screen.tell(line, state.max_steps)


def metrics_line(step: int, epoch: float, logs: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers logs in our words: a training line, a validation line, or None for anything else."""
    line: dict[str, Any] = {"step": step, "epoch": round(epoch, 4)}
    if "eval_loss" in logs:
        line |= {"validation_loss": logs["eval_loss"], "perplexity": logs["eval_perplexity"]}
        parts = {key.partition("/")[2]: value for key, value in logs.items() if key.startswith("eval_loss/")}
        return line | ({"validation_loss_by_dataset": parts} if parts else {})
    if "loss" not in logs:
        return None
    line |= {"loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": logs.get("learning_rate")}
    parts = {key.partition("/")[2]: value for key, value in logs.items() if key.startswith("loss/")}
    line |= {"loss_by_dataset": parts} if parts else {}
    return line | {key: logs[key] for key in SPEEDS if key in logs}


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity; a reader in another language would refuse the line."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(path: Path, step: int) -> float:
    """Drop the lines of metrics.jsonl after a step, which a resumed run writes again, and one that is cut off.

    Returns the seconds of training that are kept.
    """
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in path.read_text("utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # the run was killed while it wrote this one
            continue
        if step and values["step"] <= step:
            kept.append(f"{line}\n")
            seconds = values.get("seconds", seconds)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(kept), "utf-8")
    aside.replace(path)
    return seconds


class SampleChat(TrainerCallback):  # type: ignore[misc]
    """Ask the model the config's questions every so many steps. Its failure is reported and never ends the run.

    `together`: weights are sharded (ZeRO-3, FSDP), so every rank must ask, at the same step. `tells`: whether this rank
    is the one that writes the answers down.
    """

    def __init__(
        self,
        assistant: Assistant,
        prompts: Sequence[Prompt],
        every: int | None,
        folder: Path,
        pace: Pace | None = None,
        *,
        together: bool = False,
        tells: bool = True,
    ) -> None:
        self._assistant, self._prompts, self._every, self._folder = assistant, prompts, every, folder
        self._pace = pace or Pace()
        self._tells, self._asks = tells, tells or together

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every `sample_steps` steps; the last one is asked when the run is saved."""
        due = self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps
        if due and not control.should_training_stop:
            self.ask(state.global_step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, to have something to compare with."""
        if self._every and state.global_step == 0:
            self.ask(0)

    def ask(self, step: int) -> None:
        """Write samples/step-N.json with each question, its pictures, and the answer or why there is none."""
        if not self._prompts or not self._asks:
            return
        model = self._assistant.model
        was_training, device = model.training, model.device
        answers = []
        with self._pace.paused(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            try:
                for prompt in self._prompts:
                    answers.append({"text": prompt.text, "images": [str(i) for i in prompt.images]})
                    answers[-1] |= self._answer(prompt, step)
            finally:
                model.train(was_training)
        if not self._tells:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"step-{step:07d}.json"
            path.write_text(json.dumps(answers, indent=2, ensure_ascii=False), "utf-8", errors="backslashreplace")
        except OSError as error:
            log.warning("samples at step %d could not be written: %s", step, error)

    def _answer(self, prompt: Prompt, step: int) -> dict[str, str]:
        """`{"answer": ...}`, or `{"answer": "", "error": ...}`: one bad picture costs one answer."""
        try:
            question = Conversation((user_message(prompt.text, prompt.images),))
            answer = self._assistant.answer(question, Generation(max_new_tokens=48))
        except Exception as error:  # a sample is a courtesy; the run is what counts, and the log has the traceback
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if self._tells:  # the others fail alike
                log.warning("sample at step %d: %s -> failed: %s", step, prompt.text, reason)
            log.debug("its traceback", exc_info=True)
            return {"answer": "", "error": reason}
        log.info("sample at step %d: %s -> %s", step, prompt.text, answer)
        return {"answer": answer}


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C and SIGTERM finish the step, save and stop; a second Ctrl-C stops at once.

    `agree` gives every rank the largest number any of them has: a signal reaches them at different steps, and all must
    stop after the same one. `asked` is this rank's own signal, which may come at any moment, also while ranks agree;
    `received` is what all of them know.
    """

    def __init__(self, agree: Callable[[int], int] = int) -> None:
        self.asked = 0
        self.received: int | None = None
        self._agree = agree

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take over both signals while training."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        log.warning("%s: finishing this step, saving, stopping (again: stop at once)", signal.Signals(number).name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop after this step, if asked to; an evaluation would outlast the patience of whoever asked."""
        self.received = self._agree(self.asked) or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control


class Report(TrainerCallback):  # type: ignore[misc]
    """Rewrite the report at every save, so that a long run can be looked at."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint is complete."""
        if state.is_world_process_zero:
            self._write()

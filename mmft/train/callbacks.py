"""What happens beside the steps: metrics, sample chat, and an orderly end when somebody asks for it."""

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from mmft.config import Prompt
from mmft.inference import Assistant, Generation, user_message
from mmft.types import Conversation

log = logging.getLogger("mmft")


class Metrics(TrainerCallback):  # type: ignore[misc]
    """One line a logging step, on the screen and in metrics.jsonl."""

    def __init__(self, path: Path, counts: Callable[[], tuple[int, int, int]], *, start_step: int = 0) -> None:
        self._path, self._counts = path, counts
        self._began = time.monotonic()
        self._last = (self._began, start_step, (0, 0, 0))
        keep_until(path, start_step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock when everything is loaded and the first samples are asked."""
        self._began = time.monotonic()
        self._last = (self._began, *self._last[1:])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line; the closing summary of transformers is not one."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now, counts = time.monotonic(), self._counts()
        then, step, before = self._last
        seconds = max(now - then, 1e-9)
        tokens, trained, images = ((new - old) / seconds for new, old in zip(counts, before, strict=True))
        self._last = (now, state.global_step, counts)
        line = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "lr": logs.get("learning_rate"),
            "tokens_per_second": round(tokens, 1),
            "trained_tokens_per_second": round(trained, 1),
            "images_per_second": round(images, 2),
            "seconds": round(now - self._began, 2),
            "memory_gb": round(peak_memory(), 3),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        left = (state.max_steps - state.global_step) * seconds / max(1, state.global_step - step)
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  %.0f tokens/s (%.0f trained)  %.2f GB  %s left",
            state.global_step,
            state.max_steps,
            line["loss"],
            line["lr"] or 0.0,
            tokens,
            trained,
            line["memory_gb"],
            duration(left),
        )


def peak_memory() -> float:
    """GB: of the GPU where there is one, else the resident memory of this process at its highest."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def duration(seconds: float) -> str:
    """`2:05`, or `1:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after a step: a resumed run writes them again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text("utf-8").splitlines() if line and json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in lines if step), "utf-8")


class SampleChat(TrainerCallback):  # type: ignore[misc]
    """Ask the model the config's questions every so many steps. Its failure is reported and never ends the run."""

    def __init__(self, assistant: Assistant, prompts: Sequence[Prompt], every: int | None, folder: Path) -> None:
        self._assistant, self._prompts, self._every, self._folder = assistant, prompts, every, folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every `sample_steps` steps; the last one is asked when the run is saved."""
        due = self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps
        if due and state.is_world_process_zero:
            self.ask(state.global_step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, to have something to compare with."""
        if self._every and state.global_step == 0 and state.is_world_process_zero:
            self.ask(0)

    def ask(self, step: int) -> None:
        """Write samples/step-N.json with each question, its pictures and the answer."""
        if not self._prompts:
            return
        model = self._assistant.model
        was_training = model.training
        model.eval()
        answers = []
        try:
            with torch.random.fork_rng():
                for prompt in self._prompts:
                    answer = self._assistant.answer(
                        Conversation((user_message(prompt.text, prompt.images),)), Generation(max_new_tokens=48)
                    )
                    log.info("sample at step %d: %s -> %s", step, prompt.text, answer)
                    answers.append({"text": prompt.text, "images": [str(i) for i in prompt.images], "answer": answer})
        except Exception:  # a sample is a courtesy; the run is what counts, and the log has the traceback
            log.warning("sample chat at step %d failed", step, exc_info=True)
        finally:
            model.train(was_training)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:07d}.json"
        path.write_text(json.dumps(answers, indent=2, ensure_ascii=False), "utf-8")


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C and SIGTERM finish the step, save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

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
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        log.warning("%s: finishing this step, saving, stopping (again: stop at once)", signal.Signals(number).name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop after this step, if asked to."""
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        return control


class Report(TrainerCallback):  # type: ignore[misc]
    """Rewrite the report at every save, so that a long run can be looked at."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint is complete."""
        if state.is_world_process_zero:
            self._write()

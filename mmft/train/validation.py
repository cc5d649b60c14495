"""Evaluation during training: the exact token mean over the whole validation set, and what follows from it.

Nothing of it reaches the training: no gradient, eval mode, random states put back, data read by a loader of its own.
What was best, and how long ago, is read from the log history that every checkpoint carries, so a resumed run knows it.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from mmft.config import Evaluation, TrainConfig
from mmft.data.collate import BAD_SAMPLES, Collator
from mmft.data.dataset import prepare
from mmft.data.store import TokenStore
from mmft.data.tokenize import Tokenizer
from mmft.errors import CheckpointError
from mmft.modeling.build import ADAPTER, LLM_FOLDER, PROJECTOR, VISION_ADAPTER
from mmft.plugins import Plugins
from mmft.types import IGNORE_INDEX

log = logging.getLogger("mmft")
LOSS, PERPLEXITY = "eval_loss", "eval_perplexity"  # transformers' spelling, which TensorBoard and W&B group by
EVALUATION = "evaluation.json"  # in final/
MODEL_PARTS = (ADAPTER, LLM_FOLDER, PROJECTOR, VISION_ADAPTER, "vision", "tokenizer")


@dataclass
class Validation:
    """What a run is evaluated on. A batch holds samples of one dataset, at most `max_samples` and `max_tokens`."""

    store: TokenStore
    collate: Collator
    settings: Evaluation
    max_samples: int | None
    max_tokens: int
    num_workers: int = 0
    seed: int = 0
    told_of_bad: bool = field(default=False, init=False)

    @property
    def names(self) -> tuple[str, ...]:
        """What the datasets are called in the log."""
        return short_names(self.store.origins.sources if self.store.origins else ("",))

    def batches(self) -> list[tuple[int, list[int]]]:
        """(dataset, items) of every batch, each item once, in a fixed order: long samples first."""
        samples = self.store.index
        first = self.store.origins.first if self.store.origins else np.array([0, len(self.store.offsets) - 1])
        dataset_of = np.searchsorted(first, samples, side="right") - 1
        lengths = self.store.lengths
        batches: list[tuple[int, list[int]]] = []
        for item in np.lexsort((-lengths, dataset_of)).tolist():
            dataset = int(dataset_of[item])
            group = batches[-1][1] if batches and batches[-1][0] == dataset else None
            full = group is None or (self.max_samples is not None and len(group) >= self.max_samples)
            if group is None or full or (len(group) + 1) * int(lengths[group[0]]) > self.max_tokens:
                batches.append((dataset, [item]))
            else:
                group.append(item)
        return batches

    def measure(
        self, model: Any, device: torch.device, *, rank: int = 0, world: int = 1,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> list[tuple[str, float, int]]:  # fmt: skip
        """(dataset, summed loss, targets) for each dataset: exact sums over all of it, `total` adds up the ranks.

        Every rank runs the model equally often, because a sharded model needs all of them for each forward.
        """
        batches = self.batches()
        mine = batches[rank::world]
        missing = math.ceil(len(batches) / world) - len(mine)
        loader: Any = torch.utils.data.DataLoader(
            self.store,  # type: ignore[arg-type]  # anything with a length and items will do
            batch_sampler=[items for _, items in (*mine, *batches[:missing])], collate_fn=self.collate,
            num_workers=self.num_workers, generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip
        sums = torch.zeros(len(self.names), 2, dtype=torch.float64)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                for number, batch in enumerate(loader):
                    self._tell_bad(batch.pop(BAD_SAMPLES, []))
                    targets = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                    inputs = {key: value.to(device) for key, value in batch.items()}
                    loss = model(**inputs, num_items_in_batch=1)["loss"]
                    if number < len(mine):
                        sums[mine[number][0]] += torch.tensor([float(loss), targets], dtype=torch.float64)
        finally:
            model.train(was_training)
        added = total(sums.to(device)).tolist()
        return [(name, loss, int(targets)) for name, (loss, targets) in zip(self.names, added, strict=True)]

    def _tell_bad(self, bad: Sequence[Any]) -> None:
        if bad and not self.told_of_bad:
            self.told_of_bad = True
            log.warning("validation: a picture cannot be read, its sample is left out: %s", bad[0])


def prepare_validation(
    config: TrainConfig, plugins: Plugins, tokenizer: Tokenizer, cache: Path, store: Any
) -> TokenStore | None:
    """The validation data of a config: its own files, or what the training data's `store` holds out."""
    if config.runtime.evaluation is None:
        return None
    if not config.data.validation:
        assert isinstance(store, TokenStore)
        return store.validation()
    own = {"datasets": config.data.validation, "validation": (), "validation_share": 0.0, "streaming": False}
    return prepare(config.data.model_copy(update=own), plugins, tokenizer, cache, log.info, seed=config.runtime.seed)


def open_validation(config: TrainConfig, store: TokenStore | None, collate: Collator) -> Validation | None:
    """The validation of a run, read with the collate function it trains with.

    A feature cache holds the pictures of the training data, which are those of a held out share, but not of own files.
    """
    settings, data = config.runtime.evaluation, config.data
    if settings is None or store is None:
        return None
    batch = config.optim.batch_size_per_device
    policy: Literal["error", "drop"] = "error" if collate.on_bad_sample == "error" else "drop"
    features = None if data.validation else collate.features
    collate = replace(collate, on_bad_sample=policy, features=features, store=None, tells_origins=False, datasets=())
    log.info("validation: %s samples, %s targets, every %s steps",
             f"{len(store):,}", f"{store.num_trained:,}", f"{settings.steps:,}")  # fmt: skip
    return Validation(
        store, collate, settings, None if data.packing else batch, batch * data.max_length, data.num_workers,
        config.runtime.seed,
    )  # fmt: skip


def evaluate(validation: Validation, trainer: Any) -> dict[str, float]:
    """One evaluation inside a `Trainer`: measure, log, and ask for a save or the end where the settings say so."""
    accelerator = trainer.accelerator
    with trainer.pace.paused():
        found = validation.measure(
            trainer.model_wrapped, trainer.args.device, rank=trainer.args.process_index, world=trainer.args.world_size,
            total=lambda sums: accelerator.reduce(sums, "sum"),
        )  # fmt: skip
    logs = as_logs(found)
    trainer.log(dict(logs))
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, logs)
    history, settings = trainer.state.log_history, validation.settings
    best = best_step(history)
    if settings.keep_best and best == trainer.state.global_step:
        trainer.control.should_save = True
    if settings.patience and (rounds := rounds_without_best(history)) >= settings.patience:
        log.info("no better validation loss for %d evaluations (best at step %s): stopping early", rounds, best)
        trainer.control.should_training_stop = True
    return logs


def as_logs(found: Sequence[tuple[str, float, int]]) -> dict[str, float]:
    """Token means: over everything, and for each dataset where there are several."""
    loss, targets = sum(one[1] for one in found), sum(one[2] for one in found)
    logs = {LOSS: loss / max(1, targets), PERPLEXITY: perplexity(loss / max(1, targets))}
    for name, part, count in found if len(found) > 1 else ():
        if count:
            logs |= {f"{LOSS}/{name}": part / count, f"{PERPLEXITY}/{name}": perplexity(part / count)}
    return logs


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else loss


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of each evaluation of a run so far, from transformers' log history."""
    found = {int(entry["step"]): float(entry[LOSS]) for entry in history if LOSS in entry}
    return sorted(found.items())


def best_step(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the lowest validation loss, the first of equals; None before any evaluation."""
    measured = [(loss, step) for step, loss in evaluations(history) if loss == loss]
    return min(measured)[1] if measured else None


def rounds_without_best(history: Sequence[Mapping[str, Any]]) -> int:
    """Evaluations since the best one."""
    best = best_step(history)
    return sum(best is None or step > best for step, _ in evaluations(history))


def is_over(state: Mapping[str, Any], settings: Evaluation | None) -> bool:
    """Whether the run of a checkpoint's trainer_state.json has nothing left to train."""
    stopped = bool(settings and settings.patience and rounds_without_best(state["log_history"]) >= settings.patience)
    return stopped or state["global_step"] >= state["max_steps"]


class WhenToEvaluate(TrainerCallback):  # type: ignore[misc]
    """Every so many steps, and at the last one."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """transformers evaluates after it has logged and before it saves."""
        control.should_evaluate = state.global_step % self._steps == 0 or state.global_step == state.max_steps
        return control


def kept_checkpoints(found: Sequence[Path], limit: int, settings: Evaluation | None, history: Any) -> set[Path]:
    """Of a run's checkpoints, newest first: the newest `limit`, and the best one where it is to be kept."""
    best = best_step(history) if settings and settings.keep_best else None
    return {*found[:limit], *(path for path in found if path.name == f"checkpoint-{best}")}


def settle_final(folder: Path, run: Path, state: Any, settings: Evaluation | None) -> str:
    """In `final/`, before it is closed: put the best weights where the config asks for them, and say what is there.

    Returns the state of the run in words. Raises `CheckpointError` where the best checkpoint is gone.
    """
    step, history = state.global_step, state.log_history
    best, losses = best_step(history), dict(evaluations(history))
    if settings is None or best is None:
        return f"finished at step {step:,}"
    kept = best if settings.final == "best" else step
    if kept != step:
        source = run / f"checkpoint-{best}"
        if not source.is_dir():
            raise CheckpointError(f"{source} was the best checkpoint and is gone; final/ cannot be made from it")
        for name in MODEL_PARTS:
            here, there = folder / name, source / name
            if there.is_dir():
                shutil.rmtree(here, ignore_errors=True)
                shutil.copytree(there, here)
            elif there.is_file():
                shutil.copyfile(there, here)
    told = {"final": settings.final, "step": kept, "validation_loss": losses.get(kept),
            "best_step": best, "best_validation_loss": losses[best], "last_step": step}  # fmt: skip
    (folder / EVALUATION).write_text(json.dumps(told, indent=2), "utf-8")
    return (
        f"finished at step {step:,}; validation loss was best ({losses[best]:.4f}) at step {best:,}; "
        f"final/ holds step {kept:,}"
    )


def short_names(sources: Sequence[str]) -> tuple[str, ...]:
    """File names without folder and suffix where that tells them apart, else the whole of it, else with a number."""
    stems = [Path(source).stem or source for source in sources]
    names = [stem if stems.count(stem) == 1 else source for stem, source in zip(stems, sources, strict=True)]
    return tuple(f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names))

"""A run's folder: its log, its config, what was left out, and the checkpoint to go on from."""

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from mmft.config import TrainConfig
from mmft.config.load import dump_config
from mmft.data.bad_samples import drop_from, found_while_training
from mmft.data.store import TokenStore
from mmft.errors import CheckpointError
from mmft.modeling.build import TABLE_COLUMNS
from mmft.modeling.checkpoint import (
    MANIFEST,
    checkpoints,
    decides_weights,
    differences,
    read_manifest,
    used_plugins,
)
from mmft.plugins import Plugins

log = logging.getLogger("mmft")
TRAINER_STATE_NAME = "trainer_state.json"  # as transformers names it
SHOWN = 4  # differences of a config


def start_log(path: Path) -> None:
    """`mmft` messages to the screen, and with their time to run.log."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    screen, file = logging.StreamHandler(sys.stdout), logging.FileHandler(path, encoding="utf-8")
    screen.setFormatter(logging.Formatter("%(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(screen)
    log.addHandler(file)
    log.setLevel(logging.INFO)
    log.propagate = False


def follow_log(rank: int) -> None:
    """On all ranks but the first: nothing but warnings, to the screen, with the rank before them."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
    log.addHandler(screen)
    log.setLevel(logging.WARNING)
    log.propagate = False


def find_checkpoint(
    config: TrainConfig, plugins: Plugins, resume: Path | bool, *, other_versions: bool = False
) -> Path | None:
    """The checkpoint to go on from. Damaged ones are named and passed over; what was another run is refused.

    Raises `CheckpointError` for one of another config, and for one of other plugins or plugin versions, unless
    `other_versions`: that run is then no longer the one a straight run would have been.
    """
    if not resume:
        return None
    folder = config.runtime.output_dir
    candidates = checkpoints(folder) if resume is True else [Path(resume)]
    for candidate in candidates:
        try:
            manifest = read_manifest(candidate)
        except CheckpointError as error:
            if resume is not True:
                raise
            log.warning("passed over: %s", error)
            continue
        if not (candidate / TRAINER_STATE_NAME).is_file():
            raise CheckpointError(
                f"{candidate} is a model, not a checkpoint: it has no {TRAINER_STATE_NAME} to go on from; "
                f"give a folder such as {folder / 'checkpoint-100'}, or --resume alone for the newest"
            )
        if not manifest.config:
            raise CheckpointError(f"{candidate} was written by an earlier version; start a new run from its weights")
        if found := differences(manifest.config, decides_weights(config)):
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise CheckpointError(
                f"{candidate} belongs to another config: {'; '.join(found[:SHOWN])}{more}. Its own is in its {MANIFEST}"
            )
        if found := differences(manifest.plugins, used_plugins(config, plugins)):
            if not other_versions:
                raise CheckpointError(
                    f"{candidate} was trained with other plugins: {'; '.join(found)}. Install what it was trained "
                    "with, or go on all the same with --allow-other-versions"
                )
            log.warning("going on with other plugins: %s", "; ".join(found))
        return candidate
    raise CheckpointError(f"nothing to resume from: {folder} has no complete checkpoint; start without --resume")


def prepare_folder(config: TrainConfig, source: Path | None, *, going_on: bool, overwrite: bool) -> None:
    """Write the config into the run's folder. An earlier run in it is never overwritten unasked."""
    folder = config.runtime.output_dir
    earlier = [*checkpoints(folder), *folder.glob("final")]
    if earlier and not going_on and not overwrite:
        raise CheckpointError(
            f"{folder} holds an earlier run ({earlier[0].name}); go on with --resume, begin anew with --overwrite, "
            "or choose another --work-dir"
        )
    if not going_on:  # what a run left that was killed before its first checkpoint is not this run's either
        for path in (*earlier, folder / "samples", folder / "tensorboard"):
            shutil.rmtree(path, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    (folder / "config.json").write_text(dump_config(config), "utf-8")
    if source and source.suffix == ".py" and source.resolve() != (folder / "config.py").resolve():
        shutil.copyfile(source, folder / "config.py")


def write_drops(path: Path, store: TokenStore, *, going_on: bool = False) -> None:
    """One line a record that is not trained as it was given; a resumed run keeps what was found while training."""
    lines = path.read_text("utf-8").splitlines() if going_on and path.is_file() else []
    kept = [line for line in lines if found_while_training(drop_from(line))]
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # a reason may quote half a character
        file.writelines(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in store.drops)
        file.writelines(f"{line}\n" for line in kept)


def log_table(rows: list[tuple[str, ...]]) -> None:
    """The module table, once, before the first step."""
    table = [tuple(TABLE_COLUMNS), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(TABLE_COLUMNS))]
    for row in table:
        log.info("%s", "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

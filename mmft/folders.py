"""Where a trained model is: a run, its final/, its newest checkpoint. Nothing is opened, and torch is not needed."""

from pathlib import Path

from mmft.errors import CheckpointError
from mmft.foreign_paths import windows_hint

MANIFEST = "mmft.json"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first, complete or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def find_model(reference: str | None, work_dirs: Path = Path("work_dirs")) -> Path:
    """The model folder behind a folder, a run, or nothing (the newest finished run under work_dirs).

    Raises `CheckpointError` where there is none.
    """
    if reference is None:
        finished = sorted(work_dirs.glob(f"**/final/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
        if not finished:
            raise CheckpointError(f"no finished run under {work_dirs}; name a model folder or a run")
        return finished[-1].parent
    folder = Path(reference)
    for candidate in (folder, folder / "final", *checkpoints(folder)):
        if (candidate / MANIFEST).is_file():
            return candidate
    found = "holds no model (no mmft.json, no final/, no checkpoint)" if folder.is_dir() else "does not exist"
    hint = windows_hint(reference) or "give a run's folder, its final/, or a checkpoint"
    raise CheckpointError(f"{reference} {found}; {hint}")

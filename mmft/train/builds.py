"""Kernels that DeepSpeed compiles when it first needs them, after a process that died while it compiled one."""

import logging
import os
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)

QUIET = 120.0  # seconds without a new file, after which nobody whom we cannot see is compiling either


def clear_abandoned_builds(quiet: float = QUIET) -> None:
    """Remove the locks of compilations that died.

    PyTorch marks a kernel under compilation by a file named `lock`, and whoever else needs the kernel waits until it is
    gone: forever and in silence, if the compiling process was killed (torch/utils/file_baton.py of PyTorch 2.13). The
    process at work keeps the file open, so a lock that no process here has open is an abandoned one, or one of a
    container or a machine that shares the folder: that one is still adding files.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")  # a folder for each kernel; by default below one for each PyTorch
    locks = list(Path(chosen).glob("*/lock") if chosen else Path(get_default_build_root()).glob("*/*/lock"))
    held = _open_files() if locks else set()
    for lock in locks:
        if lock.resolve() not in held:
            _clear(lock, quiet)


def _clear(lock: Path, quiet: float) -> None:
    told = False
    while lock.exists() and (age := time.time() - _newest(lock.parent)) < quiet:
        if not told:
            logger.warning(
                "%s: a kernel is being compiled by a process that cannot be seen from here, or by one that was killed; "
                "waiting %.0f seconds. If nobody compiles, delete the file.", lock, quiet - age,
            )  # fmt: skip
            told = True
        time.sleep(min(1.0, quiet))
    if lock.exists():
        lock.unlink(missing_ok=True)
        logger.warning("%s: removed; the process that was compiling this kernel was killed", lock)


def _newest(folder: Path) -> float:
    """When a file of a folder was last written, in seconds since the epoch; 0 where there is none."""
    times = []
    for path in folder.iterdir():
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # compilers make and delete files
            continue
    return max(times, default=0.0)


def _open_files() -> set[Path]:
    """The files that the processes of this user have open."""
    files: set[Path] = set()
    for process in psutil.process_iter():
        try:
            files.update(Path(entry.path).resolve() for entry in process.open_files())
        except (psutil.Error, OSError):
            continue
    return files

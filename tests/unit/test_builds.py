import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from mmft.train.builds import clear_abandoned_builds


def compile_forever(lock: Path, started) -> None:
    """What a process does that compiles a kernel, as PyTorch marks it."""
    assert FileBaton(str(lock)).try_acquire()
    started.set()
    time.sleep(600)


@pytest.fixture
def compiling(tmp_path, monkeypatch):
    """A process that is compiling a kernel, and its lock."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "some_kernel"
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=compile_forever, args=(folder / "lock", started))
    process.start()
    assert started.wait(120)
    yield process, folder / "lock"
    process.kill()
    process.join()


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_the_lock_of_a_process_that_is_still_compiling_stays(compiling):
    clear_abandoned_builds(quiet=0)
    assert compiling[1].exists()


def test_the_lock_of_a_killed_process_is_removed_so_that_nobody_waits_for_it(compiling, caplog):
    process, lock = compiling
    kill(process)
    assert not FileBaton(str(lock)).try_acquire(), "PyTorch itself would wait"
    clear_abandoned_builds(quiet=0)
    assert FileBaton(str(lock)).try_acquire()
    assert f"{lock}: removed" in caplog.text


def test_a_young_lock_of_nobody_here_is_waited_for_and_named_and_then_removed(compiling, caplog):
    process, lock = compiling
    kill(process)
    os.utime(lock)
    began = time.time()
    clear_abandoned_builds(quiet=1.5)
    assert not lock.exists()
    assert time.time() - began >= 1
    assert "waiting" in caplog.text


def test_where_nothing_was_ever_compiled_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    clear_abandoned_builds()


def test_files_named_lock_that_are_no_kernels_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    deeper = tmp_path / "project" / "database" / "lock"
    deeper.parent.mkdir(parents=True)
    deeper.touch()
    clear_abandoned_builds(quiet=0)
    assert deeper.exists()

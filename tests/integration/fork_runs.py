"""Runs of `mmft train` in children of one process that has imported everything: a kill -9 costs a second, not ten.

Reads a JSON object a line from standard input and answers each with one: `{"arguments": [...], "kill_in_save": n}`
gives `{"code": ..., "output": ...}`, where the code is negative for a signal. `kill_in_save` ends the child by SIGKILL
at the n-th file it touches in a save, `kill_after` after so many seconds from the first line of metrics.jsonl, and
`largest_file` is a number of bytes above which writing a file fails, as on a disk that is full.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - imported once, here, for all children
import transformers.trainer  # noqa: F401

import mmft.train.run  # noqa: F401
from mmft.cli import main

TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def kill_in_save(number: int) -> None:
    """SIGKILL for this process when it touches the n-th file of a checkpoint that is being written or let go of."""
    left = number

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in TOUCHES or not isinstance(arguments[0], str | Path):
            return
        if any(part == ".saving" or part.startswith("checkpoint-") for part in Path(arguments[0]).parts):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touched)


def child(request: dict[str, Any], output: int) -> None:
    """One run; never returns."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if "kill_in_save" in request:
        kill_in_save(request["kill_in_save"])
    if "largest_file" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an error, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    sys.argv = ["mmft", *request["arguments"]]
    code: Any = 1
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait or kill, and tell how it ended."""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            child(request, output.fileno())
        if "kill_after" in request:
            metrics, deadline = Path(request["metrics"]), time.monotonic() + 120
            size = metrics.stat().st_size if metrics.is_file() else 0
            ended = (0, 0)
            while not ended[0] and time.monotonic() < deadline:
                ended = os.waitpid(pid, os.WNOHANG)
                if metrics.is_file() and metrics.stat().st_size != size:
                    break
                time.sleep(0.002)
            if not ended[0]:
                time.sleep(request["kill_after"])
                os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
            status = ended[1]
        else:
            status = os.waitpid(pid, 0)[1]
        output.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "output": output.read().decode("utf-8", "replace")}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()

"""`mmft train --nproc 8`: hand over to torchrun, or recognise that torchrun or srun has started this process already.

torchrun replaces this process, so what it prints, its exit code and its signals are its own. Nothing here imports
torch.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from mmft.errors import ConfigError, Problem

TIME_TO_SAVE = 1800  # seconds torchrun waits after SIGTERM for a step and its checkpoint; its own 30 cut many short
RANGE = re.compile(r"(?P<before>[^\[\]]*)\[(?P<numbers>[\d,-]+)\](?P<after>.*)")


@dataclass(frozen=True)
class Launch:
    """How many processes, and where. `address` and `port` are those of the first node, the same on every node."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    address: str | None = None
    port: int | None = None

    def problems(self) -> Iterator[Problem]:
        """What torchrun would only say after a long wait."""
        if self.nnodes > 1 and not self.address:
            yield Problem("--master-addr", f"{self.nnodes} nodes need the first one's address", "give the same on all")
        if self.node_rank >= self.nnodes:
            yield Problem("--node-rank", f"{self.node_rank} of {self.nnodes} nodes", "count from 0, set --nnodes")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """torchrun's command line for `mmft` with these arguments."""
        where = ["--standalone"] if self.nnodes == 1 and not (self.address or self.port) else [
            "--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank),
            "--master-addr", self.address or "127.0.0.1", "--master-port", str(self.port or 29500),
        ]  # fmt: skip
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.nproc), *where]
        torchrun += ["--shutdown-timeout", str(TIME_TO_SAVE)]
        return [*torchrun, "-m", "--", "mmft", *arguments]  # what follows is not torchrun's, however it is called


def started_already(environment: MutableMapping[str, str]) -> bool:
    """Whether this process is one of several: torchrun's, or srun's, whose variables are translated to torchrun's."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return True
    slurm = slurm_variables(environment)
    environment.update(slurm)
    return bool(slurm)


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of `srun` (one task a GPU), or nothing.

    The batch script itself is no such task: sbatch sets SLURM_NTASKS too, but no SLURM_STEP_ID.
    """
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if step is None or int(tasks) < 2 or "SLURM_PROCID" not in environment:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    job = int(environment.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or next(expand_hosts(nodes), "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (job + int(step)) % 20000),
    }


def expand_hosts(hosts: str) -> Iterator[str]:
    """Slurm's short form of host names: `node[03-05,7],gpu1` -> node03, node04, node05, node7, gpu1."""
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", hosts):
        yield from _expand(item)


def _expand(item: str) -> Iterator[str]:
    found = RANGE.fullmatch(item)
    if found is None:
        yield item
        return
    for numbers in found["numbers"].split(","):
        first, _, last = numbers.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand(f"{found['before']}{number:0{len(first)}}{found['after']}")


def replace_by_torchrun(launch: Launch, arguments: Sequence[str]) -> None:
    """Become torchrun, which starts this command anew `nproc` times; never returns."""
    problems = list(launch.problems())
    if problems:
        raise ConfigError(problems)
    # torchrun would set 1 and print a warning; processes that share the cores without a limit stand in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.nproc)))
    sys.stdout.flush()
    command = launch.command(arguments)
    os.execvp(command[0], command)

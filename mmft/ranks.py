"""The processes of a run: who this one is, and what it does for, or with, the others.

torchrun (or srun) starts them and says so in RANK, LOCAL_RANK and WORLD_SIZE. Without those a run is one process and
nothing here communicates. The functions ask the process group that there is; `Ranks` is what a run is handed.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mmft.config import Runtime
from mmft.errors import ModelError

Result = TypeVar("Result")
PATIENCE = timedelta(days=7)  # preparing data on the first rank may take hours
SPEAKS_FIRST = 2.0  # seconds the other ranks leave the first one to say what is wrong, before torchrun ends it


def is_alone() -> bool:
    """Whether this process is the whole run."""
    return not _is_joined() or dist.get_world_size() == 1


def is_first() -> bool:
    """Whether this rank is the one that writes files and speaks."""
    return not _is_joined() or dist.get_rank() == 0


def gathered(mine: Result) -> list[Result]:
    """What each rank brings, in the order of the ranks. All of them must call it at the same point of the run."""
    if is_alone():
        return [mine]
    found: list[Result] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def all_raise(error: Exception) -> NoReturn:
    """End a run for a reason that all ranks have: the first one raises it, the others leave without a word."""
    if not is_first():
        time.sleep(SPEAKS_FIRST)
        raise SystemExit(2)
    raise error


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class Ranks:
    """This process among all. `patient` is a gloo group whose members wait for each other as long as it takes."""

    rank: int = 0
    local: int = 0
    size: int = 1
    patient: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def first_does(self, work: Callable[[], Result]) -> Result:
        """Do something on the first rank while the others wait; all get its result.

        Where it fails, the first rank raises and the others leave without a word, with the same exit code.
        """
        if self.size == 1:
            return work()
        error: BaseException | None = None
        told: list[Any] = [None, None]
        if self.first:
            try:
                told = [True, work()]
            except BaseException as raised:
                error, told = raised, [False, None]
        dist.broadcast_object_list(told, src=0, group=self.patient)
        if error is not None:
            raise error
        if not told[0]:
            time.sleep(SPEAKS_FIRST)
            raise SystemExit(2)
        return told[1]  # type: ignore[no-any-return]

    def one_by_one(self, work: Callable[[], Result]) -> Result:
        """Everyone does it: the first rank, then one of each node, then the rest, who find on disk what those left."""
        if self.size == 1:
            return work()
        kept: list[Result] = []
        self.first_does(lambda: kept.append(work()))
        if self.local == 0 and not kept:
            kept.append(work())
        self.wait()
        return kept[0] if kept else work()

    def wait(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            dist.monitored_barrier(group=self.patient, timeout=PATIENCE)

    def total(self, values: torch.Tensor, how: str = "sum") -> torch.Tensor:
        """The sum, max or min of a CPU tensor over all ranks. Everybody must call it."""
        if self.size > 1:
            dist.all_reduce(values, getattr(dist.ReduceOp, how.upper()), group=self.patient)
        return values

    def any(self, claim: int) -> int:
        """The largest of everybody's numbers: what one rank noticed, all of them know."""
        return int(self.total(torch.tensor([claim]), "max"))


@contextmanager
def started(runtime: Runtime) -> Iterator[Ranks]:
    """Join the process group, where there is one or an engine needs one; leave it when all is done.

    A group that somebody joined before is used, and left to them. Without leaving, a rank may abort at interpreter exit
    after a good run. After an error nobody waits for anybody: this process ends, and torchrun ends the others.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which warns of finding no GPU
    size = int(os.environ.get("WORLD_SIZE", "1"))
    alone = size == 1 and "RANK" not in os.environ
    if alone and not (runtime.deepspeed or runtime.fsdp):
        yield Ranks()
        return
    with _group_of_one() if alone else nullcontext():
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        joined = not dist.is_initialized()
        backend = _backend(runtime, local)
        if joined:
            dist.init_process_group(backend)
        yield Ranks(rank, local, size, dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None)
        if size > 1:
            dist.barrier()
        if joined:
            dist.destroy_process_group()


@contextmanager
def _group_of_one() -> Iterator[None]:
    """torchrun's variables for a single process, for as long as it trains."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _backend(runtime: Runtime, local: int) -> str:
    """gloo on a CPU; NCCL beside it on GPUs, of which this process takes its own.

    A task of `srun --gpus-per-task 1` sees one GPU, its own, whatever its number on the node: libraries are told that
    it is number 0. Processes of torchrun see all GPUs of their node.
    """
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    found = torch.cuda.device_count()
    if found == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",") and "LOCAL_WORLD_SIZE" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        local = 0
    if local >= found:
        raise ModelError(f"--nproc: there are {found} GPUs here; ask for no more processes a node")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

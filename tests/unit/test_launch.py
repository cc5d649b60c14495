"""How a run of several processes is started: torchrun's command line, and Slurm's variables in torchrun's words."""

import os
import subprocess
import sys

import pytest
import torch

from mmft.config import Runtime
from mmft.errors import ConfigError, ModelError
from mmft.ranks import Ranks, _backend, started
from mmft.train.engine import Engine
from mmft.train.launch import Launch, expand_hosts, replace_by_torchrun, slurm_variables, started_already

SRUN = {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234567",
}


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[03-05,7],gpu1", ["node03", "node04", "node05", "node7", "gpu1"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("r[1-2]n[1-2].hpc", ["r1n1.hpc", "r1n2.hpc", "r2n1.hpc", "r2n2.hpc"]),
        ("x-1,y-[098-101]-z", ["x-1", "y-098-z", "y-099-z", "y-100-z", "y-101-z"]),
        ("", []),
    ],
)
def test_host_lists_of_slurm_are_expanded(short, hosts):
    assert list(expand_hosts(short)) == hosts


def test_a_task_of_srun_is_a_rank_and_the_first_host_the_master():
    told = slurm_variables(SRUN)
    assert told == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu03", "MASTER_PORT": "34568"
    }  # fmt: skip
    assert slurm_variables({**SRUN, "SLURM_PROCID": "0"})["MASTER_PORT"] == told["MASTER_PORT"]
    assert slurm_variables({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"})["MASTER_ADDR"] == "10.0.0.1"


def test_a_batch_script_and_a_single_task_are_no_ranks():
    script = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "gpu[03-04]"}
    assert slurm_variables(script) == {}
    assert slurm_variables({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_a_process_of_torchrun_is_known_by_rank_and_world_size():
    assert started_already({"RANK": "0", "WORLD_SIZE": "1"})
    assert not started_already({"WORLD_SIZE": "4"})
    environment = dict(SRUN)
    assert started_already(environment)
    assert environment["RANK"] == "9"


def test_one_node_finds_a_port_itself_and_several_meet_at_the_first():
    assert Launch(8).command(["train", "c"])[1:] == [
        "-m", "torch.distributed.run", "--nproc-per-node", "8", "--standalone",
        "--shutdown-timeout", "1800", "-m", "--", "mmft", "train", "c",
    ]  # fmt: skip
    command = Launch(8, 2, 1, "10.0.0.1").command(["train", "c"])
    expected = (
        "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500 --shutdown-timeout 1800 -m -- mmft train c"
    )
    assert " ".join(command).endswith(expected)


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(1)`: as on a machine with so many GPUs; the devices that were then taken."""
    taken = []

    def gpus(count, **environment):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        for name in ("LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return taken

    return gpus


@pytest.mark.parametrize("visible", ["0", "3", "GPU-8f2a"])
def test_a_task_of_srun_that_sees_one_gpu_takes_it_whatever_its_number_on_the_node(gpus, visible):
    taken = gpus(1, CUDA_VISIBLE_DEVICES=visible, LOCAL_RANK="5")
    assert _backend(Runtime(output_dir="run"), 5) == "cpu:gloo,cuda:nccl"
    assert taken == [0]
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed and accelerate choose their device by it"


def test_processes_that_see_all_gpus_take_their_own_and_one_too_many_is_refused(gpus):
    taken = gpus(2, LOCAL_RANK="1")
    _backend(Runtime(output_dir="run"), 1)
    assert taken == [1]
    with pytest.raises(ModelError, match="there are 2 GPUs here; ask for no more processes a node"):
        _backend(Runtime(output_dir="run"), 2)


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0", "LOCAL_WORLD_SIZE": "2"}])
def test_a_second_process_of_torchrun_on_one_gpu_is_refused(gpus, environment):
    gpus(1, **environment)
    with pytest.raises(ModelError, match="there are 1 GPUs here"):
        _backend(Runtime(output_dir="run"), 1)


def test_processes_that_cannot_share_rows_evenly_are_refused_before_anything_is_loaded():
    with pytest.raises(ModelError, match=r"sequence_parallel: 2 must divide the number of processes \(3\)"):
        Engine(Ranks(size=3), sequence=2)
    assert Engine(Ranks(rank=3, size=4), sequence=2).counts_rows is False


@pytest.mark.parametrize("own", [None, "7"])
def test_the_environment_of_a_run_alone_is_as_it_was_afterwards(own, monkeypatch, tmp_path):
    """An engine needs a process group; what a run changes beside it in the environment is not taken back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("LOCAL_RANK", own)
    monkeypatch.delenv("MMFT_SET_BY_A_RUN", raising=False)
    with started(Runtime(output_dir=tmp_path, device="cpu", fsdp=True)) as ranks:
        assert (ranks.size, os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == (1, "1", "0")
        monkeypatch.setenv("MMFT_SET_BY_A_RUN", "kept")
    assert (os.environ.get("LOCAL_RANK"), "RANK" in os.environ) == (own, False)
    assert os.environ["MMFT_SET_BY_A_RUN"] == "kept"


@pytest.mark.parametrize(
    ("launch", "problem"),
    [(Launch(1, 2), "--master-addr: 2 nodes need"), (Launch(1, 2, 2, "a"), "--node-rank: 2 of 2 nodes; count from 0")],
)
def test_nodes_that_could_never_meet_are_refused_at_once(launch, problem):
    with pytest.raises(ConfigError, match=problem):
        replace_by_torchrun(launch, [])


def test_a_bad_config_is_told_once_before_anything_is_started():
    environment = {**os.environ, "NPROC_PER_NODE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "mmft", "train", "no_such.json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "mmft: error: no_such.json: no such file; give a .py or .json config, or a name of `list-cfg`\n"
    )

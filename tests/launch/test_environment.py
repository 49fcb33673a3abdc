"""Finding a process's place by the launcher's variables, and refusing worlds that cannot be."""

from __future__ import annotations

import pytest

from launch.environment import Launch, detect, device_index, first_host
from megatron_implicit.errors import LaunchError

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "5", "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip
"""The fifth task of a step of five on three nodes."""
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def test_a_process_of_its_own() -> None:
    assert detect({}) == Launch("none")
    assert detect({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}).world_size == 1


def test_torchrun() -> None:
    assert detect(TORCH) == Launch("torchrun", 3, 4, 1, 2)


def test_torchrun_as_one_agent_a_node_of_a_step() -> None:
    agents = {**STEP, **TORCH, "SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"}
    assert detect(agents) == Launch("torchrun", 3, 4, 1, 2)
    with pytest.raises(LaunchError, match="2 tasks but torchrun sees 1 agents: give torchrun --nnodes=2"):
        detect({**agents, "GROUP_WORLD_SIZE": "1"})


def test_srun_with_one_task_a_rank() -> None:
    launch = detect(STEP)
    assert (launch.launcher, launch.rank, launch.world_size) == ("srun", 4, 5)
    assert (launch.local_rank, launch.local_world_size, launch.address) == (0, 1, "n08")
    assert launch.port == detect({**STEP, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).port
    assert launch.port != detect({**STEP, "SLURM_STEP_ID": "2"}).port
    assert detect({**STEP, "MASTER_ADDR": "ib0", "MASTER_PORT": "1"}).address == "ib0"
    assert detect({**STEP, "SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"


def test_mpirun_inside_and_outside_of_slurm() -> None:
    assert detect(OPEN_MPI) == Launch("mpirun", 2, 4, 0, 2)
    assert detect({**OPEN_MPI, **BATCH_SCRIPT}) == Launch("mpirun", 2, 4, 0, 2)
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert detect(hydra) == Launch("mpirun", 1, 2, 1, 2)
    with pytest.raises(LaunchError, match="started 4 ranks but Slurm allocated 8 tasks .*mpirun -n 8"):
        detect({**OPEN_MPI, **BATCH_SCRIPT, "SLURM_NTASKS": "8"})


def test_a_process_started_alone_where_slurm_allocated_several_tasks() -> None:
    with pytest.raises(LaunchError, match="allocated 4 tasks .SLURM_NTASKS. but started this process alone: put srun"):
        detect(BATCH_SCRIPT)


def test_stale_variables_against_sruns() -> None:
    with pytest.raises(LaunchError, match="RANK=3 and WORLD_SIZE=4 are set, but srun says task 4 of 5.*unset RANK"):
        detect({**STEP, **TORCH})


def test_a_variable_that_is_no_number() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE=two in the environment is not a number"):
        detect({**TORCH, "WORLD_SIZE": "two"})


def test_gpus_against_local_ranks() -> None:
    launch = Launch("srun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert device_index(launch, None, {}) == 1
    assert device_index(launch, 4, {}) == device_index(launch, 8, {}) == 1
    assert device_index(launch, 1, {"SLURM_GPUS_PER_TASK": "1"}) == 0
    with pytest.raises(
        LaunchError, match="rank 5 .*: 4 ranks on this node but 2 GPUs visible: ask for --gpus-per-node=4"
    ):
        device_index(launch, 2, {})
    with pytest.raises(LaunchError, match="Slurm gave GPUs 0,1 but torch sees none"):
        device_index(launch, None, {"SLURM_STEP_GPUS": "0,1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[03-05,9],m1", "n03"), ("m1,n[3-4]", "m1"), ("r[1-2]n[7-8]-ib", "r1n7-ib"), ("a-b[7]", "a-b7")],
)
def test_the_first_host_of_a_compressed_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first

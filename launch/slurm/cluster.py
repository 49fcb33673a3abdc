"""cluster.env: what a site's Slurm wants to be told, as shell variables, since the batch scripts source it too."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_implicit.errors import LaunchError

EXAMPLES = "SLURM/cluster.nvidia.env and SLURM/cluster.mi300x.env are examples"
TIME_FORMS = "minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S or UNLIMITED"
"""What sbatch takes for a time limit."""
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|unlimited|infinite", re.IGNORECASE)


@dataclass(frozen=True)
class Cluster:
    """Settings of cluster.env; the variable of a field is its name in capitals."""

    path: Path
    account: str = ""
    """Empty fields leave the matter to Slurm's defaults."""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    """Features a node must have."""
    sbatch_arguments: str = ""
    """Anything else for sbatch, as on its command line without spaces inside arguments."""
    gpus_per_node: str = "8"
    """0 for a cluster of CPUs."""
    gpu_request: str = ""
    """How GPUs are asked for where it is not --gpus-per-node, for example --gres=gpu:mi300x:8."""
    ranks_per_node: str = ""
    """Empty: one a GPU."""
    cpus_per_rank: str = ""
    memory_per_node: str = "0"
    """As --mem takes it; 0 is all there is."""
    time: str = "24:00:00"
    """Time limit of a job; a run may take many."""
    warning_seconds: str = "300"
    """How long before the limit ranks are asked to save and end."""
    accelerator: str = ""
    """Name of the GPU, for estimates, as in megatron_implicit/device/peaks.py."""
    runs: str = ""
    """Folder of all runs, on a file system that all nodes share; empty: runs/ in the repository."""
    data: str = ""
    """Dataset, in place of a preset's data.path."""
    python: str = ""
    """Interpreter on the nodes (inside the container, if there is one); empty: the repository's .venv."""

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return int(self.ranks_per_node or self.gpus_per_node)

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        return int(self.gpus_per_node)


def is_time_limit(text: str) -> bool:
    """Whether sbatch takes it for one: ``TIME_FORMS``."""
    return _TIME.fullmatch(text) is not None


def read_cluster(path: Path) -> Cluster:
    """The settings of a file, evaluated by bash as the batch scripts do.

    Raises:
        LaunchError: the file is missing or bash refuses it, or a number or time is none.
    """
    if not path.is_file():
        raise LaunchError(f"{path}: no such file; copy one and fill it in ({EXAMPLES})")
    names = [field.name for field in fields(Cluster) if field.name != "path"]
    program = 'source "$1" && shift && for name; do printf "%s\\0" "${!name-unset}"; done'
    # A variable of the submitting shell is no setting, PYTHON or DATA for example.
    unset = [argument for name in names for argument in ("-u", name.upper())]
    command = ["env", *unset, "bash", "-c", program, "_", str(path.resolve()), *(name.upper() for name in names)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise LaunchError(
            f"{path}: bash says: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}"
        )
    values = {name: value for name, value in zip(names, done.stdout.split("\0")) if value != "unset"}
    cluster = Cluster(path, **values)
    for name in ("gpus_per_node", "ranks_per_node", "cpus_per_rank", "warning_seconds"):
        value = getattr(cluster, name)
        if value and not value.isdigit():
            raise LaunchError(f"{path}: {name.upper()}={value} must be a whole number")
    if not is_time_limit(cluster.time):
        raise LaunchError(f"{path}: TIME={cluster.time} must be {TIME_FORMS}")
    if not cluster.ranks:
        raise LaunchError(f"{path}: set RANKS_PER_NODE where GPUS_PER_NODE=0")
    return cluster

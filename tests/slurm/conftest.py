"""A cluster of two nodes, a dataset, and runs submitted with the shipped scripts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.conftest import REPOSITORY, SETTINGS, make_dataset
from tests.slurm.cluster import Cluster

EXACT = (
    "loss", "grad_norm", "learning_rate", "iterations_mean", "iterations_max", "evaluations_mean", "evaluations_max",
    "residual_mean", "residual_max", "validation_loss", "phase", "tokens",
)  # fmt: skip
"""What must not change by a bit when a run is interrupted."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    started = Cluster(Path("/tmp") / f"slurm-{tmp_path_factory.getbasetemp().name}")
    yield started
    started.stop()


class SubmittedRuns:
    """Submits a small configuration with SLURM/submit.sh: tensor parallel over two nodes, a rank each.

    Args:
        folder: for dataset, settings and runs.
        cluster: where they run.
        settings: sections that replace those of the configuration.
    """

    def __init__(self, folder: Path, cluster: Cluster, **settings: dict[str, Any]) -> None:
        self._cluster, self.folder = cluster, folder
        make_dataset(
            folder / "data", [f"Sentence {i} tells of {i * i} things and of their order.\n" * 4 for i in range(120)]
        )
        values = {**SETTINGS, "data": {**SETTINGS["data"], "path": str(folder / "data")}, "parallel": {"tensor": 2}}
        self.config = folder / "small.yaml"
        self.config.write_text(yaml.safe_dump(values | settings), encoding="utf-8")
        self.cluster_file = folder / "cluster.env"
        self.cluster_file.write_text(
            f"GPUS_PER_NODE=0\nRANKS_PER_NODE=1\nMEMORY_PER_NODE=100\nTIME=20\nRUNS={folder / 'runs'}\n"
            f"PYTHON={sys.executable}\nexport OMP_NUM_THREADS=1\n",
            encoding="utf-8",
        )

    def submit(self, name: str, *arguments: str, cluster: str = "") -> list[str]:
        """Numbers of the jobs of a run; ``cluster`` is added to cluster.env."""
        cluster_file = self.folder / f"{name}.env"
        cluster_file.write_text(self.cluster_file.read_text(encoding="utf-8") + cluster, encoding="utf-8")
        command = [
            "bash",
            REPOSITORY / "SLURM" / "submit.sh",
            self.config,
            "--cluster",
            cluster_file,
            "--nodes",
            2,
        ]
        done = self._cluster.run(*command, "--run.dir", self.folder / "runs" / name, *arguments, PYTHON=sys.executable)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.split()[1].rstrip(":") for line in done.stdout.splitlines()]

    def log(self, name: str) -> str:
        """What the jobs of a run wrote."""
        path = self.folder / "runs" / name / "logs" / "slurm.out"
        return path.read_text() if path.exists() else ""

    def entries(self, name: str) -> list[dict[str, Any]]:
        """All lines of a run's metrics."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def curve(self, name: str) -> dict[int, dict[str, Any]]:
        """What must be the same to the bit, by step."""
        return {entry["step"]: {key: entry.get(key) for key in EXACT} for entry in self.entries(name)}

    def redone(self, name: str) -> list[int]:
        """How many steps each attempt repeated of what the one before had done."""
        counts, last = [], None
        for entry in self.entries(name):
            if last is not None and entry["attempt"] != last["attempt"]:
                counts.append(last["step"] - entry["step"] + 1)
            last = entry
        return counts

    def last_step(self, name: str) -> int:
        """The newest step of the run's record; -1 without one."""
        return max((entry["step"] for entry in self.entries(name)[-1:]), default=-1)


def wait_until(reached: Callable[[], bool], timeout: float, what: str, pause: float = 0.05) -> None:
    """Looks often: every ``pause`` seconds."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(pause)


def start_pretraining(launcher: list[object], config: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """launch/pretrain.py under some launcher."""
    command = [*launcher, REPOSITORY / "launch" / "pretrain.py", "--config", config, "--run.dir", run_dir]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)

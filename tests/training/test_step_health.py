"""The judgement of steps: spikes, limits, policies, and that a resumed run judges as the uninterrupted one."""

from __future__ import annotations

import json
import math

import pytest

from megatron_implicit.config import HealthConfig
from megatron_implicit.errors import DivergedError
from megatron_implicit.training.health import Action, StepHealth


def healthy(config: HealthConfig, steps: int = 16) -> StepHealth:
    """After some usual steps."""
    health = StepHealth(config)
    health.enter_phase("main")
    for step in range(steps):
        loss, norm = 3.0 + 0.1 * (step % 3), 1.0 + 0.2 * (step % 4)
        health.record(health.judge(loss, norm, {}, None, 0), loss, norm)
    return health


def test_a_spike_is_judged_by_its_own_policy() -> None:
    health = healthy(HealthConfig(gradient_spike="skip", loss_spike="log"))
    assert health.judge(3.1, 1.3, {}, None, 0).action is Action.ACCEPT
    spike = health.judge(3.1, 40.0, {}, None, 0)
    assert spike.action is Action.SKIP and spike.findings[0].kind == "gradient_spike"
    logged = health.judge(30.0, 1.3, {}, None, 0)
    assert logged.action is Action.ACCEPT and logged.findings[0].kind == "loss_spike"


def test_no_spike_is_seen_before_there_is_something_usual_nor_in_another_phase() -> None:
    config = HealthConfig(gradient_spike="stop")
    assert healthy(config, steps=15).judge(3.0, 1e6, {}, None, 0).action is Action.ACCEPT
    health = healthy(config, steps=16)
    assert health.judge(3.0, 1e6, {}, None, 0).action is Action.STOP
    health.enter_phase("free")
    assert health.judge(3.0, 1e6, {}, None, 0).action is Action.ACCEPT


def test_small_moves_of_a_run_that_hardly_moves_are_no_spikes() -> None:
    health = StepHealth(HealthConfig(gradient_spike="stop"))
    for _ in range(64):
        health.record(health.judge(1.0, 1.0, {}, None, 0), 1.0, 1.0)
    assert health.judge(1.0, 1.05, {}, None, 0).action is Action.ACCEPT


@pytest.mark.parametrize("loss, norm, broken", [(math.nan, 1.0, None), (1.0, math.inf, None), (1.0, 1.0, "an iterate")])
def test_what_is_not_finite_is_found(loss: float, norm: float, broken: str | None) -> None:
    verdict = StepHealth(HealthConfig()).judge(loss, norm, {}, broken, 0)
    assert verdict.action is Action.SKIP and verdict.findings[0].kind == "nonfinite"


def test_solver_limits() -> None:
    health = StepHealth(HealthConfig(divergence="skip", unconverged_limit=0.5, residual_limit=0.2))
    assert health.judge(1.0, 1.0, {"unconverged_fraction": 0.5, "residual_mean": 0.2}, None, 0).action is Action.ACCEPT
    assert health.judge(1.0, 1.0, {"unconverged_fraction": 0.6, "residual_mean": 0.1}, None, 0).action is Action.SKIP
    assert health.judge(1.0, 1.0, {"unconverged_fraction": None, "residual_mean": 0.3}, None, 0).action is Action.SKIP


def test_a_step_is_repeated_as_often_as_allowed_then_skipped() -> None:
    health = StepHealth(HealthConfig(nonfinite="retry", retries=2))
    actions = [health.judge(math.nan, 1.0, {}, None, repeats).action for repeats in range(3)]
    assert actions == [Action.RETRY, Action.RETRY, Action.SKIP]


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    health = StepHealth(HealthConfig(max_skipped=3))
    bad, good = health.judge(math.nan, 1.0, {}, None, 0), health.judge(1.0, 1.0, {}, None, 0)
    for verdict in (bad, bad, bad, good, bad, bad, bad):
        health.record(verdict, 1.0, 1.0)
    with pytest.raises(DivergedError, match="4 steps in a row were skipped, more than health.max_skipped=3"):
        health.record(bad, 1.0, 1.0)
    assert health.counts == {"nonfinite": 7, "skipped": 7}


def test_the_state_survives_a_checkpoint() -> None:
    before = healthy(HealthConfig(gradient_spike="skip"))
    before.record(before.judge(3.0, 50.0, {}, None, 0), 3.0, 50.0)
    after = StepHealth(HealthConfig(gradient_spike="skip"))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    after.enter_phase("main")
    assert after.judge(3.0, 40.0, {}, None, 0) == before.judge(3.0, 40.0, {}, None, 0)

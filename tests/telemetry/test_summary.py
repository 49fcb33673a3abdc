"""A run in a few numbers."""

from __future__ import annotations

import pytest

from megatron_implicit.telemetry.summary import summarize
from tests.telemetry.runs import implicit_run, record


def test_an_implicit_run_is_summarised_by_phase() -> None:
    summary = summarize(implicit_run(40))
    assert (summary.steps, summary.tokens, summary.seconds) == (40, 40_000, 20.0)
    assert (summary.first_validation_loss, summary.last_validation_loss) == (8.3, pytest.approx(7.7))
    bounded, free = summary.phases
    assert (bounded.name, bounded.first_step, bounded.last_step) == ("bounded", 1, 30)
    assert (bounded.evaluations, bounded.residual, bounded.unconverged) == (4, pytest.approx(0.2), None)
    assert (free.first_step, free.last_step, free.evaluations, free.evaluations_max) == (31, 40, 9, 11)
    assert (free.unconverged, free.loss, free.tokens_per_s) == (0.25, pytest.approx(7.6), 2000.0)


def test_an_explicit_run_has_no_solves() -> None:
    (phase,) = summarize([record(1), record(2)]).phases
    assert (phase.evaluations, phase.evaluations_max, phase.residual, phase.unconverged) == (None, None, None, None)


def test_a_run_without_steps_has_no_phases() -> None:
    summary = summarize([{"step": 0, "tokens": 0, "phase": "main", "validation_loss": 8.0}])
    assert (summary.steps, summary.phases, summary.first_validation_loss) == (0, [], 8.0)

"""Gradients put together piece by piece are those of one graph."""

from __future__ import annotations

import pytest

from tests.schedules.toy import Problem, textbook, without_schedule


@pytest.mark.parametrize("stages", [2, 3])
def test_pieces_add_up_to_the_whole_gradient(stages: int) -> None:
    spread = set()
    for seed in range(12):
        problem = Problem.random(seed, stages)
        cut, whole = without_schedule(problem), textbook(problem)
        assert [evaluations for _, evaluations in cut.reports] == [evaluations for _, evaluations in whole.reports]
        assert [loss for loss, _ in cut.reports] == pytest.approx([loss for loss, _ in whole.reports], rel=1e-6)
        for name, value in whole.gradients.items():
            assert float((cut.gradients[name] - value).norm()) <= 2e-6 * float(value.norm()), (seed, name)
        spread |= {evaluations for _, evaluations in cut.reports}
    assert len(spread) >= 4, spread  # the problems need different numbers of evaluations

"""Whatever arrives when: the same losses, evaluations and gradients, bit for bit, and no deadlock."""

from __future__ import annotations

import pytest
import torch

from tests.schedules.runs import random_schedules, run_on_threads
from tests.schedules.toy import Problem, without_schedule


@pytest.mark.parametrize("problems", [8, pytest.param(100, marks=pytest.mark.acceptance)])
@pytest.mark.parametrize("stages", [2, 3])
def test_delays_change_nothing_between_threads(stages: int, problems: int) -> None:
    torch.set_num_threads(1)
    for seed in range(problems):
        problem = Problem.random(seed, stages)
        expected = without_schedule(problem)
        for delay_seed in (1, 2):
            assert run_on_threads(problem, delay_seed, slowest=0.002).equals(expected), problem


def test_delays_change_nothing_between_processes(pool) -> None:
    """200 random schedules over Gloo."""
    assert pool(3).run(two_and_three_stages, timeout=240)[0] == []


def two_and_three_stages() -> list[str]:
    """100 problems each."""
    return random_schedules(list(range(100)), 3, slowest=0.002) + random_schedules(list(range(100, 200)), 2, 0.002)

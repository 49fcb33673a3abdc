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


@pytest.mark.parametrize("problems", [50, pytest.param(200, marks=pytest.mark.acceptance)])
def test_delays_change_nothing_between_processes(pool, problems: int) -> None:
    """Random schedules over Gloo, half of them on three stages."""
    assert pool(3).run(two_and_three_stages, problems // 2, timeout=240)[0] == []


def two_and_three_stages(number: int) -> list[str]:
    """That many problems each."""
    three, two = range(number), range(number, 2 * number)
    return random_schedules(list(three), 3, slowest=0.002) + random_schedules(list(two), 2, slowest=0.002)

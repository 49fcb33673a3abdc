"""The solver's phases over a run, and over branches with steps of another size."""

from __future__ import annotations

import pytest

from megatron_implicit.config import Config, load_config
from megatron_implicit.training.curriculum import Curriculum

STEPS = 10


def run(length: int) -> Config:
    """A run whose last fifth is free."""
    return load_config(
        [
            "--train.steps", str(STEPS), "--train.global_batch_size", "8", "--data.sequence_length", str(length),
            "--curriculum", "[{start: 0.0, name: bounded}, {start: 0.8, name: free}]",
        ]
    )  # fmt: skip


def phases(length: int, from_step: int, consumed_tokens: int) -> list[str]:
    """Names of the phases of all later steps."""
    curriculum, tokens = Curriculum(run(length)), 8 * length
    return [
        curriculum.phase(step, consumed_tokens + (step - from_step) * tokens).name for step in range(from_step, STEPS)
    ]


def test_phases_are_shares_of_the_run() -> None:
    assert phases(16, 0, 0) == ["bounded"] * 8 + ["free"] * 2


@pytest.mark.parametrize("length, free", [(64, 1), (4, 5)])
def test_a_branch_with_steps_of_another_size_has_all_phases(length: int, free: int) -> None:
    """Shares are of the tokens that the whole run will have consumed: 5 steps of 16 tokens, then 5 of others."""
    assert phases(length, 5, 5 * 8 * 16) == ["bounded"] * (5 - free) + ["free"] * free

"""The schedule's bubble where all stages have the same work: by stages, limits and size of the head."""

from __future__ import annotations

from typing import Any, Iterator

from megatron_implicit.planning.evaluations import FREE, Evaluations
from megatron_implicit.schedules.costs import Link, LinkCosts, PartCosts, StageCosts
from megatron_implicit.schedules.protocol import Limits, StepPlan
from megatron_implicit.schedules.simulator import simulate

DRAWS = 4
"""Steps with different orders of evaluations that a number is the mean of."""
LATENCY = 0.05
"""Of a message, in units of a stage's forward pass."""


def bubble_table(microbatches: int, head: float) -> Iterator[dict[str, Any]]:
    """Rows of bubble percentages for bounded (4+1) and free (24+4) steps, at the default limits and others.

    Args:
        microbatches: M.
        head: forward pass of head and loss, in units of a forward pass of the whole stack; layers are divided so that
            every stage has the same work.
    """
    for passes, evaluations, k in (("4+1", Evaluations(((4, 1.0),)), 1), ("24+4", FREE, 4)):
        for stages in (2, 4, 8):
            for solving in (stages, 2 * stages, 3 * stages, 4 * stages):
                limits = Limits.default(stages, solving)
                plan = StepPlan(stages, microbatches, k, limits)
                costs = PartCosts(plan, _balanced(stages, head, evaluations.mean, k))
                bubbles = [
                    simulate(plan, evaluations.draw(microbatches, seed), costs, LinkCosts(Link(LATENCY))).bubble
                    for seed in range(DRAWS if evaluations.varies else 1)
                ]
                yield {
                    "passes": passes, "stages": stages, "solving": solving, "graphs": limits.graphs,
                    "block": limits.block, "bubble_percent": 100 * sum(bubbles) / len(bubbles),
                }  # fmt: skip


def _balanced(stages: int, head: float, evaluations: float, passes: int) -> list[StageCosts]:
    """A stack of ``stages`` units, shared so that the last stage's work with the head is that of the others; a backward
    pass is two forward passes."""
    units = evaluations + 3 * passes  # forward passes that a layer costs a microbatch
    extra = 3 * head * stages / units  # the head as so many layers
    others = 1 + extra / stages
    last = others - extra
    return [StageCosts(others, others, 2 * others)] * (stages - 1) + [
        StageCosts(last, last, 2 * last, head=3 * head * stages)
    ]

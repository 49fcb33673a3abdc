"""How many evaluations of F the solves of a phase take: given, or assumed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_implicit.config import SolverConfig
from megatron_implicit.errors import ConfigError


@dataclass(frozen=True)
class Evaluations:
    """Shares of microbatches by the evaluations of their solve."""

    shares: tuple[tuple[int, float], ...]
    """(evaluations, share); the shares add up to 1."""

    @property
    def mean(self) -> float:
        """Evaluations of a microbatch on average."""
        return sum(evaluations * share for evaluations, share in self.shares)

    @property
    def varies(self) -> bool:
        """Whether microbatches differ."""
        return len(self.shares) > 1

    def draw(self, count: int, seed: int = 0) -> list[int]:
        """Evaluations of ``count`` microbatches: as many of each number as its share says, in random order, so that a
        small draw has the distribution's mean too."""
        drawn, reached = [], 0.0
        for evaluations, share in self.shares:
            reached += share * count
            drawn += [evaluations] * (round(reached) - len(drawn))
        random.Random(seed).shuffle(drawn)
        return drawn

    def of_slowest(self, count: int, replicas: int) -> float:
        """Sum over the slowest replica's ``count`` microbatches, in units of the mean replica's; at least 1.

        Mean over 32 seeded steps in which every replica draws on its own.
        """
        if not self.varies or replicas == 1:
            return 1.0
        numbers, weights = zip(*self.shares)
        generator, steps, slowest = random.Random(0), 32, 0.0
        for _ in range(steps):
            slowest += max(sum(generator.choices(numbers, weights, k=count)) for _ in range(replicas))
        return max(1.0, slowest / steps / (self.mean * count))

    def at_most(self, cap: int) -> "Evaluations":
        """The same solves under a smaller maximum: those that would take longer end there."""
        shares: dict[int, float] = {}
        for evaluations, share in self.shares:
            shares[min(evaluations, cap)] = shares.get(min(evaluations, cap), 0.0) + share
        return Evaluations(tuple(shares.items()))


FREE = Evaluations(((8, 0.10), (10, 0.25), (12, 0.25), (14, 0.15), (17, 0.12), (20, 0.06), (24, 0.07)))
"""Assumed of a phase that stops at a tolerance, mean 13.3: a made-up distribution with a tail at the cap.
Measure it (evaluations in metrics.jsonl) and pass it instead."""


def evaluations_of(solver: SolverConfig, free: Evaluations = FREE) -> Evaluations:
    """Of a phase's solves: the maximum where the tolerance is 0, else ``free`` up to the maximum; an unrolled phase
    has none."""
    if solver.gradient == "unrolled":
        return Evaluations(((0, 1.0),))
    if solver.tolerance == 0:
        return Evaluations(((solver.max_iterations, 1.0),))
    return free.at_most(solver.max_iterations)


def parse_evaluations(text: str) -> Evaluations:
    """'12' (all alike) or '8:0.2,12:0.5,24:0.3' (number:share).

    Raises:
        ConfigError: neither.
    """
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        shares = [(int(number), float(share) if colon else 1.0) for number, colon, share in pairs]
    except ValueError:
        shares = []
    whole = abs(sum(share for _, share in shares) - 1.0) < 1e-6
    if not whole or min(number for number, _ in shares) < 1:
        raise ConfigError(
            f"--evaluations {text}: give a number, or numbers with shares that add up to 1, like 8:0.2,12:0.5,24:0.3"
        )
    return Evaluations(tuple(sorted(shares)))

"""The solver's phases as a function of consumed tokens: no counter of their own, so they survive any resume."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_implicit.config import Config, PhaseConfig, SolverConfig
from megatron_implicit.config.resolve import solver_of_phase


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with its solver values."""

    name: str
    solver: SolverConfig


class Curriculum:
    """Phases of a resolved configuration."""

    def __init__(self, config: Config) -> None:
        self._tokens = config.train.tokens
        self._phases: list[tuple[PhaseConfig, Phase]] = [
            (phase, Phase(phase.name, solver_of_phase(config.solver, phase))) for phase in config.curriculum
        ]

    def phase(self, consumed_tokens: int) -> Phase:
        """The phase of the step that begins after ``consumed_tokens``."""
        # A start is reached when the fraction is, up to the rounding of the fraction itself.
        fraction = consumed_tokens / self._tokens + 1e-12
        return [phase for entry, phase in self._phases if entry.start <= fraction][-1]

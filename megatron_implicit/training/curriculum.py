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
        self._steps = config.train.steps
        self._step_tokens = config.train.global_batch_size * config.data.sequence_length
        self._phases: list[tuple[PhaseConfig, Phase]] = [
            (phase, Phase(phase.name, solver_of_phase(config.solver, phase))) for phase in config.curriculum
        ]

    def phase(self, steps: int, consumed_tokens: int) -> Phase:
        """The phase of the step after so many steps and tokens; those before a branch may have had other sizes."""
        whole = consumed_tokens + (self._steps - steps) * self._step_tokens
        # A start is reached when the fraction is, up to the rounding of the fraction itself.
        fraction = consumed_tokens / whole + 1e-12
        return [phase for entry, phase in self._phases if entry.start <= fraction][-1]

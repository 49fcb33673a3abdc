"""Named errors whose message tells the user what to do. The commands print them as one line and exit non-zero."""

from __future__ import annotations

from typing import Any

from megatron_implicit import exits


class MegatronImplicitError(Exception):
    """Base of every error a user can cause or must act on; its message names the thing and the remedy."""

    exit_code = exits.FAILURE
    """What a command ends with."""


class ConfigError(MegatronImplicitError):
    """A configuration key, its value, and what would be accepted instead."""

    exit_code = exits.USAGE


class DataError(MegatronImplicitError):
    """A corpus, tokenizer or indexed dataset that is missing, damaged or does not fit."""


class CheckpointError(MegatronImplicitError):
    """A checkpoint that is missing, damaged or belongs to another model or run."""


class NonFiniteIterateError(MegatronImplicitError):
    """The fixed-point iteration produced NaN or infinity; names evaluation and samples, and once the trainer knows
    them, step and microbatch."""

    def __init__(self, *, evaluation: int, samples: list[int], step: int | None = None, microbatch: int | None = None):
        self.evaluation, self.samples, self.step, self.microbatch = evaluation, samples, step, microbatch
        place = "" if step is None else f"step {step}, microbatch {microbatch}, "
        super().__init__(
            f"{place}evaluation {evaluation}: the fixed-point iterate of sample {', '.join(map(str, samples))} is not "
            "finite; lower optimizer.learning_rate or solver.damping, or resume from an earlier checkpoint"
        )

    @classmethod
    def of(cls, broken_at: Any) -> "NonFiniteIterateError":
        """The error of a trace's ``broken_at`` [b], of which some entry is not 0."""
        first = int(broken_at[broken_at > 0].min())
        return cls(evaluation=first, samples=(broken_at == first).nonzero().flatten().tolist())

    def at(self, step: int, microbatch: int) -> "NonFiniteIterateError":
        """The same error with the step and microbatch it happened in."""
        return NonFiniteIterateError(evaluation=self.evaluation, samples=self.samples, step=step, microbatch=microbatch)


class CapacityError(MegatronImplicitError):
    """More tokens than the cache of keys and values was made for."""

    def __init__(self, *, needed: int, capacity: int, what: str = "") -> None:
        self.needed, self.capacity = needed, capacity
        super().__init__(
            f"{what}{needed} tokens do not fit the cache of {capacity}: shorten the prompt or make the cache larger"
        )


class LeaseLostError(MegatronImplicitError):
    """Another job works on the run's folder now: this one may not write there any more."""


class DesyncError(MegatronImplicitError):
    """Ranks that should hold the same parameters do not: the memory of one of them, or its arithmetic, went wrong."""

    exit_code = exits.RESTART


class DivergedError(MegatronImplicitError):
    """The loss or the gradient is no longer finite."""


class LaunchError(MegatronImplicitError):
    """The machine or launcher does not provide what the run needs."""


class MachineError(MegatronImplicitError):
    """Ranks or machines that went wrong; another start, perhaps on other machines, may succeed."""

    exit_code = exits.RESTART

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
    """The fixed-point iteration produced NaN or infinity; names evaluation and samples, and where they are known step,
    pipeline stage and microbatch."""

    def __init__(
        self, *, evaluation: int, samples: list[int], step: int | None = None, microbatch: int | None = None,
        stage: str | None = None,
    ) -> None:  # fmt: skip
        self.evaluation, self.samples, self.step, self.microbatch, self.stage = (
            evaluation, samples, step, microbatch, stage,
        )  # fmt: skip
        known = {"step": step, "": stage, "microbatch": microbatch}
        place = "".join(f"{name} {value}, ".lstrip() for name, value in known.items() if value is not None)
        super().__init__(
            f"{place}evaluation {evaluation}: the fixed-point iterate of sample {', '.join(map(str, samples))} is not "
            "finite; lower optimizer.learning_rate or solver.damping, or resume from an earlier checkpoint"
        )

    @classmethod
    def of(cls, broken_at: Any) -> "NonFiniteIterateError":
        """The error of a trace's ``broken_at`` [b], of which some entry is not 0."""
        first = int(broken_at[broken_at > 0].min())
        return cls(evaluation=first, samples=(broken_at == first).nonzero().flatten().tolist())

    def at(
        self, step: int | None = None, microbatch: int | None = None, stage: str | None = None
    ) -> "NonFiniteIterateError":
        """The same error with the step, microbatch and pipeline stage it happened in; None keeps what is known."""
        return NonFiniteIterateError(
            evaluation=self.evaluation,
            samples=self.samples,
            step=self.step if step is None else step,
            microbatch=self.microbatch if microbatch is None else microbatch,
            stage=self.stage if stage is None else stage,
        )


class CapacityError(MegatronImplicitError):
    """More tokens than the cache of keys and values was made for."""

    def __init__(self, *, needed: int, capacity: int, what: str = "") -> None:
        self.needed, self.capacity = needed, capacity
        super().__init__(
            f"{what}{needed} tokens do not fit the cache of {capacity}: shorten the prompt or make the cache larger"
        )


class LeaseLostError(MegatronImplicitError):
    """Another job works on the run's folder now: this one may not write there any more."""

    exit_code = exits.USAGE  # started again, it would take the folder from the job that has it


class DesyncError(MegatronImplicitError):
    """Ranks that should hold the same parameters do not: the memory of one of them, or its arithmetic, went wrong."""

    exit_code = exits.RESTART


class DivergedError(MegatronImplicitError):
    """The loss or the gradient is no longer finite."""


class PipelineError(MegatronImplicitError):
    """Pipeline stages lost each other: one died, gave up, or sent what it could not; names rank, stage, microbatch and
    evaluation.

    Args:
        message: the line.
        restart: whether another start of the job may succeed.
    """

    def __init__(self, message: str, *, restart: bool = True) -> None:
        super().__init__(message)
        self.exit_code = exits.RESTART if restart else exits.FAILURE


class LaunchError(MegatronImplicitError):
    """The machine or launcher does not provide what the run needs."""


class MachineError(MegatronImplicitError):
    """Ranks or machines that went wrong; another start, perhaps on other machines, may succeed."""

    exit_code = exits.RESTART

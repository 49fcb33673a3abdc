"""What travels between the stages, in which order gradients are added, and how much may be in flight."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Optional

from megatron_implicit.errors import PipelineError


class ProtocolError(PipelineError):
    """A stage got a message it did not expect: the stages no longer agree on what they are doing."""


class Kind(enum.IntEnum):
    """What a message is, and likewise the task that it asks for. The values are on the wire."""

    SOLVE = 0
    """A pass without gradient; travels forwards."""
    OUTPUT = 1
    """The last pass of an inference solve, without gradient; travels forwards."""
    PHANTOM = 2
    """A pass with gradient; travels forwards."""
    BACKWARD = 3
    """The backward pass of a PHANTOM; travels backwards."""
    STOP = 4
    """The sender has sent everything; both directions."""
    ABORT = 5
    """The sender gives up; both directions."""

    @property
    def forwards(self) -> bool:
        """Whether it travels from stage p to p + 1, and from the last stage to stage 0."""
        return self is not Kind.BACKWARD


class Message(NamedTuple):
    """A header: what its payload is. A stage that got it has the task of the same name."""

    kind: Kind
    microbatch: int
    """Counted from 0 over this replica's microbatches of a step."""
    evaluation: int
    """Pass of this kind, counted from 0: of the solve, or of the passes with gradient, whose BACKWARD has the same."""

    def __str__(self) -> str:
        if self.kind in (Kind.STOP, Kind.ABORT):
            return self.kind.name
        what = {Kind.SOLVE: "evaluation", Kind.OUTPUT: "output pass", Kind.PHANTOM: "pass with gradient"}
        words = what.get(self.kind, "backward pass of evaluation with gradient")
        return f"microbatch {self.microbatch}, {words} {self.evaluation + 1}"


@dataclass(frozen=True)
class Limits:
    """How many microbatches may be in flight on a pipeline. There are no barriers between waves of them."""

    solving: int
    """W: microbatches in their solve."""
    graphs: int
    """G: microbatches whose passes with gradient have begun and whose backward passes have not all ended."""
    block: int
    """g: microbatches whose backward passes alternate. The order is static, so that gradients are added in the same
    order whatever arrives first. g <= G, or the block that is due could not be completed."""

    def __post_init__(self) -> None:
        if min(self.solving, self.graphs, self.block) < 1 or self.block > self.graphs:
            raise ValueError(f"{self}: all must be at least 1, and block at most graphs, or the pipeline deadlocks")

    @property
    def in_flight(self) -> int:
        """Microbatches between their admission and their last task on stage 0."""
        return self.solving + self.graphs

    @classmethod
    def default(cls, stages: int, solving: Optional[int] = None) -> "Limits":
        """W = 2P (or ``parallel.microbatches_in_flight``), G = P, g = P/2: a stage holds about as many graphs of its
        layers as an unpipelined microbatch has, and the bubble stays at a few percent."""
        return cls(solving=2 * stages if solving is None else solving, graphs=stages, block=max(1, stages // 2))


@dataclass(frozen=True)
class StepPlan:
    """What all stages of a pipeline know before a step: everything but the numbers of evaluations."""

    stages: int
    """P, at least 2."""
    microbatches: int
    """M, of this replica."""
    passes: int
    """k, passes with gradient of each microbatch; 0 in an inference solve, which has no backward half."""
    limits: Limits
    unrolled: bool = False
    """There is no solve: all passes carry gradient, and the first of them admits."""

    def __post_init__(self) -> None:
        if self.stages < 2 or self.microbatches < 1 or self.passes < 0 or (self.unrolled and not self.passes):
            raise ValueError(f"{self}: needs two stages, a microbatch, and where unrolled a pass with gradient")

    @cached_property
    def backward_order(self) -> tuple[Message, ...]:
        """The order in which every stage runs its backward passes: by blocks, latest pass first."""
        block = self.limits.block
        return tuple(
            Message(Kind.BACKWARD, microbatch, evaluation)
            for start in range(0, self.microbatches, block)
            for evaluation in reversed(range(self.passes))
            for microbatch in range(start, min(start + block, self.microbatches))
        )

    @property
    def first_kind(self) -> Kind:
        """What admits a microbatch."""
        return Kind.PHANTOM if self.unrolled else Kind.SOLVE

    def admits(self, message: Message) -> bool:
        """Whether this is the first pass of its microbatch: x travels with it."""
        return message.kind is self.first_kind and message.evaluation == 0

    def tensors(self, message: Message, receiver: int) -> int:
        """Tensors in a message's payload.

        Forwards: h (or z, back to stage 0), and x with the first pass. Backwards: the gradient of what travelled
        forwards, and with that of the first pass with gradient the sum of x's gradient over the later stages; the way
        back from stage 0 to the last stage has no x.
        """
        if message.kind.forwards:
            return 2 if self.admits(message) and receiver > 0 else 1
        return 2 if message.evaluation == 0 and receiver < self.stages - 1 else 1

"""What the driver asks of a stage's arithmetic; ``model_stage`` answers with a model, tests with a toy.

The driver passes payloads on as they are: lists of tensors whose number ``StepPlan.tensors`` fixes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

from torch import Tensor

from megatron_implicit.comm.channel import TensorSpec
from megatron_implicit.schedules.protocol import Message
from megatron_implicit.solver import Step


@dataclass(frozen=True)
class Outcome:
    """What a task gave."""

    tensors: list[Tensor] = field(default_factory=list)
    """The payload of the message that follows; on the judge the z of the decision."""
    step: Optional[Step] = None
    """The solve's decision, after a forward task of the last stage."""


class StageCompute(Protocol):
    """One stage of one step. Tasks come in the order the schedule gives; within a microbatch that is first evaluation
    to last, then the passes with gradient, then their backward passes, latest first."""

    iterate: TensorSpec
    """h, z and their gradients: [s or s/t, b, h] float32."""
    embedding: TensorSpec
    """x, the normalised embedding, of the iterate's shape in the parameters' dtype."""
    embedding_gradient: TensorSpec
    """The sum of x's gradient over stages, float32."""

    def admit(self, microbatch: int) -> list[Tensor]:
        """Stage 0: reads a microbatch and embeds it: [z0, x]."""

    def forward(self, task: Message, tensors: list[Tensor]) -> Outcome:
        """Evaluates this stage's slice of F for SOLVE, OUTPUT or PHANTOM.

        The first pass of a microbatch comes with x: the stage computes its own u from it and keeps both. A PHANTOM
        keeps the graph of the slice, from a fresh leaf to what it returns. The last stage completes F with the final
        norm, reports F(z) to the microbatch's ``FixedPointSolve`` and, when that is done, computes the loss.

        Raises:
            NonFiniteIterateError: the last stage's solve found a non-finite iterate.
        """

    def backward(self, task: Message, tensors: list[Tensor]) -> Outcome:
        """Runs the backward pass of a recorded PHANTOM and drops its graph.

        ``tensors`` is [dh], for evaluation 0 [dh, dx] (dx summed over later stages). On the last stage it is empty
        for the last pass, where the loss is the root, and else [dz], what F's later pass says of z.
        Returns [dh], for evaluation 0 [dh, dx] with this stage's share of dx added; stage 0 carries dx on into its
        embedding and returns [dh], for evaluation 0 nothing.
        """

    def finish(self) -> list[Any]:
        """After the last task of a step: carries the gradient of the effective weights into the parameters.

        Returns: the loss function's reports by microbatch, in order, on the last stage; elsewhere nothing.
        """

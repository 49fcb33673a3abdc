"""A stage's share of the gradient: what each pass recorded, and how its backward pass is run by itself.

The graph of a microbatch is cut at every link, at x and u, and at the damped update on the last stage. Each piece runs
from leaves to one output, so that a piece can be backpropagated when its turn in the static order comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from megatron_implicit.comm.channel import TensorSpec
from megatron_implicit.schedules.compute import Outcome
from megatron_implicit.schedules.protocol import Kind, Message, StepPlan
from megatron_implicit.solver import FixedPointSolve, Step


class StageModel(Protocol):
    """A stage's slice of a model, without any bookkeeping."""

    iterate: TensorSpec
    embedding: TensorSpec

    def embed(self, microbatch: int) -> Tensor:
        """Stage 0: x, the normalised embedding, with its graph."""

    def inject(self, x: Tensor) -> Tensor:
        """u from this stage's replica of the injection."""

    def evaluate(self, h: Tensor, u: Tensor) -> Tensor:
        """This stage's slice of F, on the last stage with the final norm."""

    def start(self, microbatch: int) -> FixedPointSolve:
        """The last stage: a fresh solve."""

    def loss(self, microbatch: int, z: Tensor, solve: FixedPointSolve) -> tuple[Tensor, Any]:
        """The last stage: what a microbatch adds to the step's loss, with its graph from z, and what to report."""

    def finish(self) -> None:
        """Carries gradient that was collected over the microbatches into the parameters."""


@dataclass
class _Microbatch:
    """What a stage holds of a microbatch in flight."""

    x: Tensor
    """Leaf."""
    u: Tensor
    """With its graph from x."""
    u_leaf: Tensor
    """What the passes see."""
    embedding: Optional[Tensor] = None
    """Stage 0: x with its graph from the parameters."""
    passes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Passes with gradient: their leaf and what they gave."""
    solve: Optional[FixedPointSolve] = None
    """The last stage."""
    leaves: dict[int, Tensor] = field(default_factory=dict)
    """The last stage: z after a pass with gradient, as the next update sees it."""
    dz: Optional[Tensor] = None
    """The last stage: the loss's gradient."""


class StageTape:
    """``StageCompute`` for a ``StageModel``."""

    def __init__(self, plan: StepPlan, stage: int, model: StageModel) -> None:
        self._plan, self._model = plan, model
        self._is_first, self._is_last = stage == 0, stage == plan.stages - 1
        self._live: dict[int, _Microbatch] = {}
        self._embeddings: dict[int, Tensor] = {}
        self._reports: dict[int, Any] = {}
        self.iterate, self.embedding = model.iterate, model.embedding
        self.embedding_gradient = TensorSpec(model.embedding.shape, torch.float32)

    @property
    def _records(self) -> bool:
        return self._plan.passes > 0

    def admit(self, microbatch: int) -> list[Tensor]:
        with torch.set_grad_enabled(self._records):
            x = self._model.embed(microbatch)
        self._embeddings[microbatch] = x
        return [torch.zeros(self.iterate.shape, dtype=self.iterate.dtype, device=x.device), x.detach()]

    def forward(self, task: Message, tensors: list[Tensor]) -> Outcome:
        if self._plan.admits(task):
            self._begin(task.microbatch, tensors[1])
        held = self._live[task.microbatch]
        if task.kind is Kind.PHANTOM:
            output, step = self._record(task, held, tensors[0])
        else:
            with torch.no_grad():
                output, step = self._judged(held, self._model.evaluate(tensors[0], held.u_leaf))
        if step is Step.DONE:
            self._complete_loss(task, held, output)
        elif task.kind is Kind.OUTPUT:
            del self._live[task.microbatch]
        carried = [held.x.detach()] if self._plan.admits(task) and not self._is_last else []
        return Outcome([output.detach(), *carried], step)

    def backward(self, task: Message, tensors: list[Tensor]) -> Outcome:
        held = self._live[task.microbatch]
        leaf, output = held.passes.pop(task.evaluation)
        gradient = self._judged_gradient(task, held, tensors) if self._is_last else tensors[0]
        torch.autograd.backward(output, gradient)
        if task.evaluation > 0:
            return Outcome([leaf.grad])
        del self._live[task.microbatch]
        dx = self._embedding_gradient(held, None if self._is_last else tensors[1])
        if self._is_first:
            torch.autograd.backward(held.embedding, dx.to(held.embedding.dtype))
            return Outcome()
        return Outcome([leaf.grad, dx])

    def finish(self) -> list[Any]:
        if self._records:
            self._model.finish()
        return [self._reports[microbatch] for microbatch in sorted(self._reports)]

    # ---------------------------------------------------------------- its parts

    def _begin(self, microbatch: int, x: Tensor) -> None:
        leaf = x.detach().requires_grad_(self._records)
        with torch.set_grad_enabled(self._records):
            u = self._model.inject(leaf)
        held = _Microbatch(leaf, u, u.detach().requires_grad_(self._records), self._embeddings.pop(microbatch, None))
        held.solve = self._model.start(microbatch) if self._is_last else None
        self._live[microbatch] = held

    def _record(self, task: Message, held: _Microbatch, h: Tensor) -> tuple[Tensor, Optional[Step]]:
        """A pass with gradient, from a leaf of its own."""
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            output, step = self._judged(held, self._model.evaluate(leaf, held.u_leaf))
        held.passes[task.evaluation] = leaf, output
        if self._is_last:
            held.leaves[task.evaluation] = held.solve.cut()
        return output, step

    def _judged(self, held: _Microbatch, image: Tensor) -> tuple[Tensor, Optional[Step]]:
        if not self._is_last:
            return image, None
        decision = held.solve.update(image)
        return decision.z, decision.step

    def _complete_loss(self, task: Message, held: _Microbatch, z: Tensor) -> None:
        """Runs the head forwards and at once backwards: its logits are the largest tensor there is."""
        microbatch = task.microbatch
        leaf = z.detach().requires_grad_(self._records)
        with torch.set_grad_enabled(self._records):
            loss, self._reports[microbatch] = self._model.loss(microbatch, leaf, held.solve)
        if self._records:
            loss.backward()
            held.dz = leaf.grad
        else:
            del self._live[microbatch]

    def _judged_gradient(self, task: Message, held: _Microbatch, tensors: list[Tensor]) -> Tensor:
        """Of z after a pass: from the loss, or from F's next pass and the damped part of the next update."""
        leaf = held.leaves.pop(task.evaluation)
        if task.evaluation == self._plan.passes - 1:
            return held.dz
        return tensors[0] if leaf.grad is None else tensors[0] + leaf.grad

    def _embedding_gradient(self, held: _Microbatch, later: Optional[Tensor]) -> Tensor:
        """This stage's gradient of x, added to that of the later stages, float32."""
        torch.autograd.backward(held.u, held.u_leaf.grad)
        own = held.x.grad.float()
        return own if later is None else later + own

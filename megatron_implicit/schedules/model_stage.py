"""A pipeline stage of a model, as the schedule asks for it: embedding, slice of F, solve, head and loss."""

from __future__ import annotations

from typing import Any, Callable, Iterator, Optional

import torch
from torch import Tensor, nn

from megatron_implicit.comm.channel import TensorSpec
from megatron_implicit.layers.leaf_weights import LeafWeights
from megatron_implicit.layers.passes import Pass
from megatron_implicit.models.language import rotary_angles, token_losses
from megatron_implicit.solver import FixedPointSolve, SolveSettings

ForwardStep = Callable[[Iterator[Any], Any], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]]
"""Megatron-Core's: takes a batch from the iterator, calls the model, returns its output and the loss function."""


class ModelStage:
    """``StageModel`` of one step.

    Megatron-Core's forward step function is called twice a microbatch: on the first stage, where the model it is given
    answers with x, and on the last stage, where it answers with the losses of the z that the passes gave.

    Args:
        model: as ``build_model`` returns it.
        settings: of the solves.
        forward_step: Megatron-Core's.
        batches: microbatches in order.
        iterate: shape and dtype of z on this rank.
        microbatches: M, by which the step's loss is divided.
        scale: of the loss, for mixed precision; None: 1.
    """

    def __init__(
        self, model: nn.Module, settings: SolveSettings, forward_step: ForwardStep, batches: Iterator[Any],
        iterate: TensorSpec, tokens: int, microbatches: int, scale: Optional[Callable[[Tensor], Tensor]],
    ) -> None:  # fmt: skip
        self._model, self._settings, self._forward_step = model, settings, forward_step
        self._batches, self._read, self._microbatches, self._scale = batches, {}, microbatches, scale
        self._next = 0
        self.iterate, self.embedding = iterate, TensorSpec(iterate.shape, model.config.params_dtype)
        self._weights = LeafWeights(model.decoder)
        self._rotary = rotary_angles(model, tokens)

    def embed(self, microbatch: int) -> Tensor:
        x, _ = self._call(microbatch, lambda tokens, _: self._model.decoder.normed(self._model.embedding(tokens, None)))
        return x

    def inject(self, x: Tensor) -> Tensor:
        return self._model.decoder.begin_normed(x, weights=self._weights.bound).injection

    def evaluate(self, h: Tensor, u: Tensor) -> Tensor:
        h = self._model.decoder.evaluate(h, Pass(weights=self._weights.bound, injection=u), self._rotary)
        return h.to(self.iterate.dtype)  # with bf16 parameters Megatron-Core's layers end in bf16

    def start(self, microbatch: int) -> FixedPointSolve:
        device = next(self._model.parameters()).device
        return self._model.decoder.start(torch.empty(self.iterate.shape, device=device), self._settings)

    def loss(self, microbatch: int, z: Tensor, solve: FixedPointSolve) -> tuple[Tensor, Any]:
        self._model.decoder.trace = solve.trace()
        losses, loss_function = self._call(microbatch, lambda _, labels: token_losses(self._model, z, labels))
        loss, report = loss_function(losses)
        loss = loss / self._microbatches
        return (self._scale(loss) if self._scale is not None else loss), report

    def finish(self) -> None:
        self._weights.backward()

    def _call(self, microbatch: int, answer: Callable[[Tensor, Optional[Tensor]], Tensor]) -> tuple[Tensor, Any]:
        """The forward step function on one microbatch, with ``answer`` in the model's place."""
        return self._forward_step(iter([self._batch(microbatch)]), _StandIn(self._model, answer))

    def _batch(self, microbatch: int) -> Any:
        """Solves of an evaluation end in any order; batches are read in theirs."""
        while self._next <= microbatch:
            self._read[self._next] = next(self._batches)
            self._next += 1
        return self._read.pop(microbatch)


class _StandIn:
    """What the forward step function calls in place of the model."""

    def __init__(self, model: nn.Module, answer: Callable[[Tensor, Optional[Tensor]], Tensor]) -> None:
        self.module, self._answer = model, answer

    def __call__(
        self, input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None, *, labels: Any = None
    ) -> Tensor:
        return self._answer(input_ids, labels)

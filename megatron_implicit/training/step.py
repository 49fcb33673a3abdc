"""One optimizer step over a global batch, through Megatron-Core's forward-backward schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.config import Config
from megatron_implicit.data.sampling import Batch
from megatron_implicit.errors import DivergedError, NonFiniteIterateError
from megatron_implicit.solver import SolveTrace
from megatron_implicit.telemetry.timing import switch_to, timed_as
from megatron_implicit.training.optimizer import TrainingParts
from megatron_implicit.training.solver_statistics import solver_statistics

from megatron.core import parallel_state  # isort: skip
from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip


@dataclass
class StepResult:
    """What one optimizer step gave; the same on all ranks but for ``traces``."""

    loss: float
    """Mean cross-entropy over the global batch, in nats a token."""
    grad_norm: float
    """Global norm before clipping; every logical parameter counted once."""
    learning_rate: float
    """Rate the step was taken with."""
    traces: list[SolveTrace] = field(default_factory=list)
    """Solver statistics of this replica's microbatches, in order."""
    statistics: dict[str, Optional[float]] = field(default_factory=dict)
    """Of the solves of all replicas, by ``FIELDS`` of ``solver_statistics``; empty in explicit models."""


class StepRunner:
    """Runs optimizer steps of a prepared model.

    Args:
        config: resolved.
        parts: wrapped model, optimizer, schedule.
    """

    def __init__(self, config: Config, parts: TrainingParts) -> None:
        self._config, self._parts = config, parts
        transformer = parts.model.module.config
        transformer.finalize_model_grads_func = _finalize_model_grads
        transformer.grad_scale_func = parts.optimizer.scale_loss
        self._microbatches = config.train.global_batch_size // (
            config.train.micro_batch_size * parallel_state.get_data_parallel_world_size()
        )

    def run(self, step: int, batches: Iterator[Batch], device: torch.device) -> StepResult:
        """Forward and backward over this replica's microbatches, then the update.

        Raises:
            NonFiniteIterateError: a solve diverged; names step and microbatch.
            DivergedError: the loss or the gradient norm is not finite.
        """
        parts, traces = self._parts, []
        parts.model.train()
        parts.model.zero_grad_buffer()
        parts.optimizer.zero_grad()

        def forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
            switch_to("data_wait")
            batch = {name: value.to(device) for name, value in next(iterator).items()}
            switch_to("forward")
            losses = _token_losses(model, batch, step, len(traces))
            traces.append(parts.model.module.decoder.trace)
            return losses, lambda output: _mean_loss(output, batch["loss_mask"])

        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=parts.model,
            num_microbatches=self._microbatches,
            seq_length=self._config.data.sequence_length,
            micro_batch_size=self._config.train.micro_batch_size,
            forward_only=False,
        )
        loss = self._agreed_loss(step, [report["loss"] for report in reports], traces)
        statistics = {}
        if self._config.implicit:
            statistics = solver_statistics(traces, parts.model.module.decoder.solver.tolerance, device)
        switch_to("optimizer")
        parts.scheduler.step(1)
        _, grad_norm, _ = parts.optimizer.step()
        if not math.isfinite(grad_norm or 0.0):
            raise DivergedError(
                f"step {step}: the gradient norm is {grad_norm}; the last checkpoint is intact. Resume from it with a "
                "lower optimizer.learning_rate in a branch (a new run.dir and checkpoint.load)"
            )
        return StepResult(loss, float(grad_norm or 0.0), parts.optimizer.param_groups[0]["lr"], traces, statistics)

    def _agreed_loss(self, step: int, losses: list[Tensor], traces: list[SolveTrace]) -> float:
        """The mean loss over all replicas; every replica raises if an iterate of any is not finite."""
        broken = [trace.broken_at.max() if trace.broken_at is not None else losses[0].new_zeros(()) for trace in traces]
        worst = torch.stack(broken)
        sums = torch.stack((torch.stack(losses).mean(), (worst > 0).any().to(losses[0].dtype)))
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        total, replicas_broken = sums.tolist()
        if replicas_broken:
            for microbatch, trace in enumerate(traces):
                if trace.broken_at is not None and bool(trace.broken_at.any()):
                    raise NonFiniteIterateError.of(trace.broken_at).at(step, microbatch)
            raise DivergedError(f"step {step}: the iterate of another replica is not finite: see its message")
        loss = total / parallel_state.get_data_parallel_world_size()
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: the loss is {loss}; no update was made. Branch off an earlier checkpoint with a lower "
                "optimizer.learning_rate"
            )
        return loss


def _finalize_model_grads(*args: Any, **kwargs: Any) -> None:
    """Megatron-Core's reduction of gradients; it waits where our clock does not see it."""
    with timed_as("communication"):
        finalize_model_grads(*args, **kwargs)


def _token_losses(model: Any, batch: Batch, step: int, microbatch: int) -> Tensor:
    """Cross-entropy of every token, [b, s]."""
    try:
        return model(batch["tokens"], None, None, labels=batch["labels"])
    except NonFiniteIterateError as error:
        raise error.at(step, microbatch) from None


def _mean_loss(losses: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Megatron-Core's loss function: mean over counted tokens, and what to report."""
    loss = (losses.float() * mask).sum() / mask.sum()
    switch_to("backward")  # the schedule's next act
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place

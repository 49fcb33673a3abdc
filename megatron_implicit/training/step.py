"""One optimizer step over a global batch, through Megatron-Core's forward-backward schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.comm.reductions import from_last_stage
from megatron_implicit.config import Config
from megatron_implicit.data.sampling import Batch
from megatron_implicit.errors import DivergedError, NonFiniteIterateError
from megatron_implicit.solver import SolveTrace
from megatron_implicit.training.optimizer import TrainingParts

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
    """Solver statistics of this replica's microbatches, in order; known to its last pipeline stage."""


class StepRunner:
    """Runs optimizer steps of a prepared model.

    Args:
        config: resolved.
        parts: wrapped model, optimizer, schedule.
    """

    def __init__(self, config: Config, parts: TrainingParts) -> None:
        self._config, self._parts = config, parts
        transformer = parts.model.module.config
        transformer.finalize_model_grads_func = finalize_model_grads
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
            batch = {name: value.to(device) for name, value in next(iterator).items()}
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
        loss = self._agreed_loss(step, [report["loss"] for report in reports], traces, device)
        parts.scheduler.step(1)
        _, grad_norm, _ = parts.optimizer.step()
        if not math.isfinite(grad_norm or 0.0):
            raise DivergedError(
                f"step {step}: the gradient norm is {grad_norm}; the last checkpoint is intact. Resume from it with a "
                "lower optimizer.learning_rate in a branch (a new run.dir and checkpoint.load)"
            )
        return StepResult(loss, float(grad_norm or 0.0), parts.optimizer.param_groups[0]["lr"], traces)

    def _agreed_loss(
        self, step: int, losses: list[Tensor], traces: list[SolveTrace], device: torch.device
    ) -> float:
        """The mean loss over all replicas; every rank raises if an iterate of any replica is not finite.

        ``losses`` and ``traces`` are what the last pipeline stage knows.
        """
        sums = torch.zeros(2, device=device)
        if losses:
            broken = [trace.broken_at.max() for trace in traces if trace.broken_at is not None]
            any_broken = (torch.stack(broken) > 0).any() if broken else sums[1]
            sums = torch.stack((torch.stack(losses).mean(), any_broken.to(losses[0].dtype)))
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        total, replicas_broken = from_last_stage(sums, parallel_state.get_pipeline_model_parallel_group()).tolist()
        if replicas_broken:
            for microbatch, trace in enumerate(traces):
                if trace.broken_at is not None and bool(trace.broken_at.any()):
                    raise NonFiniteIterateError.of(trace.broken_at).at(step, microbatch)
            raise DivergedError(f"step {step}: the iterate of another rank is not finite: see its message")
        loss = total / parallel_state.get_data_parallel_world_size()
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: the loss is {loss}; no update was made. Branch off an earlier checkpoint with a lower "
                "optimizer.learning_rate"
            )
        return loss


def _token_losses(model: Any, batch: Batch, step: int, microbatch: int) -> Tensor:
    """Cross-entropy of every token, [b, s]."""
    try:
        return model(batch["tokens"], None, None, labels=batch["labels"])
    except NonFiniteIterateError as error:
        raise error.at(step, microbatch) from None


def _mean_loss(losses: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Megatron-Core's loss function: mean over counted tokens, and what to report."""
    loss = (losses.float() * mask).sum() / mask.sum()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place

"""One optimizer step over a global batch, through Megatron-Core's forward-backward schedule or our recirculating one."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.comm.ring import ring_of_layout
from megatron_implicit.comm.sharing import from_last
from megatron_implicit.config import Config
from megatron_implicit.data.sampling import Batch
from megatron_implicit.errors import DivergedError, NonFiniteIterateError
from megatron_implicit.schedules import Limits
from megatron_implicit.schedules.recirculating import RecirculatingSchedule
from megatron_implicit.solver import SolveTrace
from megatron_implicit.training.optimizer import TrainingParts

from megatron.core import parallel_state  # isort: skip
from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip


@dataclass
class StepResult:
    """What one optimizer step gave; the same on all ranks but for ``traces``, which a replica's ranks share."""

    loss: float
    """Mean cross-entropy over the global batch, in nats a token."""
    grad_norm: float
    """Global norm before clipping; every logical parameter counted once."""
    learning_rate: float
    """Rate the step was taken with."""
    traces: list[SolveTrace] = field(default_factory=list)
    """Solver statistics of this replica's microbatches, in order."""


def forward_backward_function(config: Config) -> Callable[..., list[Any]]:
    """The schedule of the configured layout; every process must call it, in the same order as other collectives."""
    parallel = config.parallel
    if not config.implicit or parallel.pipeline == 1:
        return get_forward_backward_func()
    ring = ring_of_layout(parallel.timeout_minutes, host_payloads=parallel.pipeline_transport == "host")
    return RecirculatingSchedule(ring, Limits.default(ring.stages, parallel.microbatches_in_flight))


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
        self.forward_backward = forward_backward_function(config)
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._microbatches = config.train.global_batch_size // (
            config.train.micro_batch_size * parallel_state.get_data_parallel_world_size()
        )

    def run(self, step: int, batches: Iterator[Batch], device: torch.device) -> StepResult:
        """Forward and backward over this replica's microbatches, then the update.

        Raises:
            NonFiniteIterateError: a solve diverged; names step and microbatch.
            PipelineError: another stage died or gave up; names ranks, microbatch and evaluation.
            DivergedError: the loss or the gradient norm is not finite.
        """
        parts = self._parts
        parts.model.train()
        parts.model.zero_grad_buffer()
        parts.optimizer.zero_grad()
        losses, traces = self._forward_backward(step, batches, device)
        loss = self._agreed_loss(step, losses, traces)
        parts.scheduler.step(1)
        _, grad_norm, _ = parts.optimizer.step()
        if not math.isfinite(grad_norm or 0.0):
            raise DivergedError(
                f"step {step}: the gradient norm is {grad_norm}; the last checkpoint is intact. Resume from it with a "
                "lower optimizer.learning_rate in a branch (a new run.dir and checkpoint.load)"
            )
        return StepResult(loss, float(grad_norm or 0.0), parts.optimizer.param_groups[0]["lr"], traces)

    def _forward_backward(
        self, step: int, batches: Iterator[Batch], device: torch.device
    ) -> tuple[list[Tensor], list[SolveTrace]]:
        """Loss and trace of every microbatch of this replica, on all its ranks."""
        decoder, microbatch = self._parts.model.module.decoder, itertools.count()

        def forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
            batch = {name: value.to(device) for name, value in next(iterator).items()}
            losses = _token_losses(model, batch, next(microbatch))
            return losses, lambda output: _mean_loss(output, batch["loss_mask"], decoder.trace)

        try:
            reports = self.forward_backward(
                forward_step_func=forward_step,
                data_iterator=batches,
                model=self._parts.model,
                num_microbatches=self._microbatches,
                seq_length=self._config.data.sequence_length,
                micro_batch_size=self._config.train.micro_batch_size,
                forward_only=False,
            )
        except NonFiniteIterateError as error:
            raise error.at(step) from None
        if self._pipeline.size() > 1:
            reports = from_last([(loss.cpu(), trace.cpu()) for loss, trace in reports], self._pipeline)
        losses, traces = zip(*reports)
        return [loss.to(device) for loss in losses], list(traces)

    def _agreed_loss(self, step: int, losses: list[Tensor], traces: list[SolveTrace]) -> float:
        """The mean loss over all replicas; every replica raises if an iterate of any is not finite."""
        broken = [trace.broken_at.max() if trace.broken_at is not None else losses[0].new_zeros(()) for trace in traces]
        worst = torch.stack(broken)
        sums = torch.stack((torch.stack(losses).mean(), (worst > 0).any().to(losses[0].device, losses[0].dtype)))
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


def _token_losses(model: Any, batch: Batch, microbatch: int) -> Tensor:
    """Cross-entropy of every token, [b, s]."""
    try:
        return model(batch["tokens"], None, None, labels=batch["labels"])
    except NonFiniteIterateError as error:
        raise error.at(microbatch=microbatch) from None


def _mean_loss(losses: Tensor, mask: Tensor, trace: SolveTrace) -> tuple[Tensor, tuple[Tensor, SolveTrace]]:
    """Megatron-Core's loss function: mean over counted tokens, and what to report."""
    loss = (losses.float() * mask).sum() / mask.sum()
    return loss, (loss.detach().clone(), trace)  # the schedule divides the loss in place

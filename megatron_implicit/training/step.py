"""One optimizer step over a global batch, through Megatron-Core's schedules or the recirculating one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.checkpoint.random_state import random_state, restore_random_state
from megatron_implicit.comm.agreement import control_group, largest
from megatron_implicit.comm.failures import is_lost_peer
from megatron_implicit.comm.reductions import from_last_stage
from megatron_implicit.comm.ring import ring_of_layout
from megatron_implicit.config import Config
from megatron_implicit.data.sampling import Batch, on_device
from megatron_implicit.errors import DivergedError, MachineError, NonFiniteIterateError
from megatron_implicit.schedules import Limits
from megatron_implicit.schedules.recirculating import RecirculatingSchedule
from megatron_implicit.solver import SolveTrace
from megatron_implicit.telemetry.timing import switch_to, timed_as
from megatron_implicit.training.health import Action, Finding, StepHealth, Verdict
from megatron_implicit.training.optimizer import TrainingParts
from megatron_implicit.training.solver_statistics import solver_statistics

from megatron.core import parallel_state  # isort: skip
from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip


@dataclass
class Measured:
    """What forward and backward of a step gave, before anything is done with it; the same on all ranks but for
    ``traces`` and ``broken``."""

    loss: float
    """Mean cross-entropy over the global batch, in nats a token."""
    traces: list[SolveTrace]
    """Solver statistics of this replica's microbatches, in order, as its last pipeline stage knows them."""
    broken: Optional[NonFiniteIterateError]
    """A solve of this rank whose iterate is not finite."""
    statistics: dict[str, Optional[float]] = field(default_factory=dict)
    """Of the solver, over all replicas."""
    grad_norm: float = 0.0
    """Global norm before clipping; every logical parameter counted once."""


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
    """Solver statistics of this replica's microbatches, in order, as its last pipeline stage knows them."""
    statistics: dict[str, Optional[float]] = field(default_factory=dict)
    """Of the solver, by ``FIELDS`` of ``solver_statistics``."""
    skipped: bool = False
    """Whether the update was left out, for the step's health."""


def forward_backward_function(
    config: Config, alive: Callable[[str], None] = lambda where: None
) -> Callable[..., list[Any]]:
    """The schedule of the configured layout; every process must call it, in the same order as other collectives.

    Args:
        config: resolved.
        alive: told of every task that a stage of the recirculating schedule begins.
    """
    parallel = config.parallel
    if not config.implicit or parallel.pipeline == 1:
        return get_forward_backward_func()
    ring = ring_of_layout(parallel.timeout_minutes, host_payloads=parallel.pipeline_transport == "host")
    return RecirculatingSchedule(ring, Limits.default(ring.stages, parallel.microbatches_in_flight), alive)


class StepRunner:
    """Runs optimizer steps of a prepared model.

    Args:
        config: resolved.
        parts: wrapped model, optimizer, schedule.
        health: judges every step; None takes a new one.
        on_gradients: called with the step's number once its gradients are there, before they are judged.
        report: called with the step's number and every judgement that found something.
        alive: told of every microbatch that begins.
    """

    def __init__(
        self, config: Config, parts: TrainingParts, health: Optional[StepHealth] = None,
        on_gradients: Callable[[int], None] = lambda step: None,
        report: Callable[[int, Verdict], None] = lambda step, verdict: None,
        alive: Callable[[str], None] = lambda where: None,
    ) -> None:  # fmt: skip
        self._config, self._parts, self._health = config, parts, health or StepHealth(config.health)
        self._on_gradients, self._report, self._alive = on_gradients, report, alive
        transformer = parts.model.module.config
        transformer.finalize_model_grads_func = _finalize_model_grads
        transformer.grad_scale_func = parts.optimizer.scale_loss
        self.forward_backward = forward_backward_function(config, alive)
        """Megatron-Core's interface; also for evaluations."""
        self._microbatches = config.train.global_batch_size // (
            config.train.micro_batch_size * parallel_state.get_data_parallel_world_size()
        )

    def run(self, step: int, batches: Iterator[Batch], device: torch.device) -> StepResult:
        """Forward and backward over this replica's microbatches, the judgement, then the update if it may be made.

        Raises:
            NonFiniteIterateError: a solve diverged and the run is to stop; names step and microbatch.
            PipelineError: another stage died or gave up; names ranks, microbatch and evaluation.
            DivergedError: the step is bad in another way and the run is to stop.
        """
        with timed_as("data_wait"):
            microbatches = list(itertools.islice(batches, self._microbatches))
        generators = random_state()
        for repeats in itertools.count():
            measured = self._forward_backward(step, microbatches, device)
            if self._config.implicit:
                solver = self._parts.model.module.decoder.solver
                measured.statistics = solver_statistics(measured.traces, solver, device)
            switch_to("optimizer")
            self._on_gradients(step)
            self._parts.optimizer.prepare_grads()
            measured.grad_norm = float(self._parts.optimizer.get_grad_norm() or 0.0)
            verdict = self._judge(measured, repeats)
            if verdict.findings:
                self._report(step, verdict)
            self._health.record(verdict, measured.loss, measured.grad_norm)
            if verdict.action is not Action.RETRY:
                break
            restore_random_state(generators)
        if verdict.action is Action.STOP:
            raise measured.broken or DivergedError(
                f"step {step}: {verdict.text}; no update was made. Branch off an earlier checkpoint with a lower "
                "optimizer.learning_rate (a new run.dir and checkpoint.load)"
            )
        return self._finish(measured, skipped=verdict.action is Action.SKIP)

    def _forward_backward(self, step: int, microbatches: list[Batch], device: torch.device) -> Measured:
        parts, numbers = self._parts, itertools.count()
        parts.model.train()
        parts.model.zero_grad_buffer()
        parts.optimizer.zero_grad()

        def forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
            number = next(numbers)
            self._alive(f"step {step}, microbatch {number}")
            batch = on_device(next(iterator), device)
            switch_to("forward")
            losses = _token_losses(model, batch, number)
            decoder = parts.model.module.decoder  # it has this microbatch's trace only when the loss is asked for
            return losses, lambda output: _mean_loss(output, batch["loss_mask"], counted, decoder.trace)

        try:
            counted = _mean_counted(microbatches, device)
            reports = self.forward_backward(
                forward_step_func=forward_step,
                data_iterator=iter(microbatches),
                model=parts.model,
                num_microbatches=self._microbatches,
                seq_length=self._config.data.sequence_length,
                micro_batch_size=self._config.train.micro_batch_size,
                forward_only=False,
            )
        except NonFiniteIterateError as error:
            raise error.at(step) from None
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise MachineError(
                f"step {step}: a rank that this one computes with is gone ({str(error).splitlines()[0]}): see the "
                "messages of the others, and start the job again: it goes on from its checkpoint"
            ) from error
        losses, traces = [loss for loss, _ in reports], [trace for _, trace in reports]
        return self._agreed(step, losses, traces, device)

    def _agreed(self, step: int, losses: list[Tensor], traces: list[SolveTrace], device: torch.device) -> Measured:
        """The mean loss over all replicas, and whether an iterate of any is not finite, as the last pipeline stage
        knows them."""
        sums = torch.zeros(2, device=device)
        if losses:
            broken = [trace.broken_at.max() for trace in traces if trace.broken_at is not None]
            any_broken = (torch.stack(broken) > 0).any() if broken else sums[1]
            sums = torch.stack((torch.stack(losses).mean(), any_broken.to(losses[0].dtype)))
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        total, replicas_broken = from_last_stage(sums, parallel_state.get_pipeline_model_parallel_group()).tolist()
        loss = total / parallel_state.get_data_parallel_world_size()
        return Measured(loss, traces, _broken_solve(step, traces) if replicas_broken else None)

    def _judge(self, measured: Measured, repeats: int) -> Verdict:
        """The judgement of all ranks: that of the one that finds the most; a model that is lost can only stop."""
        broken = str(measured.broken) if measured.broken else None
        verdict = self._health.judge(measured.loss, measured.grad_norm, measured.statistics, broken, repeats)
        if not largest(verdict.severity):
            return verdict
        verdicts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(verdicts, (verdict, broken is not None), group=control_group())
        # Of equally bad ones that of a rank which knows the iterate: a loss that is not finite tells the others less.
        verdict, _ = max(verdicts, key=lambda other: (other[0].severity, other[1]))
        if verdict.action in (Action.SKIP, Action.RETRY) and largest(not self._parameters_are_finite()):
            lost = Finding("nonfinite", "parameters are not finite, so that no step can be good")
            return Verdict(Action.STOP, (*verdict.findings, lost))
        return verdict

    def _parameters_are_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self._parts.model.parameters())

    def _finish(self, measured: Measured, *, skipped: bool) -> StepResult:
        """Makes the update, or leaves it out; the schedule counts the step in both cases."""
        self._parts.scheduler.step(1)
        if not skipped:
            self._parts.optimizer.step()
        rate = self._parts.optimizer.param_groups[0]["lr"]
        return StepResult(measured.loss, measured.grad_norm, rate, measured.traces, measured.statistics, skipped)


def _finalize_model_grads(*args: Any, **kwargs: Any) -> None:
    """Megatron-Core's reduction of gradients; it waits where our clock does not see it."""
    with timed_as("communication"):
        finalize_model_grads(*args, **kwargs)


def _broken_solve(step: int, traces: list[SolveTrace]) -> Optional[NonFiniteIterateError]:
    """The first of this rank's microbatches whose iterate is not finite."""
    for microbatch, trace in enumerate(traces):
        if trace.broken_at is not None and bool(trace.broken_at.any()):
            return NonFiniteIterateError.of(trace.broken_at).at(step, microbatch)
    return None


def _token_losses(model: Any, batch: Batch, microbatch: int) -> Tensor:
    """Cross-entropy of every token, [b, s]."""
    try:
        return model(batch["tokens"], None, None, labels=batch["labels"])
    except NonFiniteIterateError as error:
        raise error.at(microbatch=microbatch) from None


def _mean_counted(microbatches: list[Batch], device: torch.device) -> Tensor:
    """Tokens that count in a microbatch of the global batch, on average; every rank must call it."""
    counted = torch.stack([batch["loss_mask"].sum() for batch in microbatches]).sum().to(device)
    dist.all_reduce(counted, group=parallel_state.get_data_parallel_group())
    return counted / (len(microbatches) * parallel_state.get_data_parallel_world_size())


def _mean_loss(
    losses: Tensor, mask: Tensor, counted: Tensor, trace: SolveTrace
) -> tuple[Tensor, tuple[Tensor, SolveTrace]]:
    """Megatron-Core's loss function, and what to report.

    Its mean over microbatches and replicas, which is made later, is the mean over the tokens of the global batch that
    count, however many of them are in each microbatch.
    """
    loss = (losses.float() * mask).sum() / counted
    switch_to("backward")  # the schedule's next act
    return loss, (loss.detach().clone(), trace)  # the schedule divides the loss in place

"""The recirculating schedule in the place of Megatron-Core's forward-backward function."""

from __future__ import annotations

from typing import Any, Callable, Iterator, Optional

import torch
from torch import nn

from megatron_implicit.comm.leadership import Leadership
from megatron_implicit.comm.channel import GroupChannel, TensorSpec
from megatron_implicit.comm.ring import Ring
from megatron_implicit.schedules.driver import Driver
from megatron_implicit.schedules.logic import StageLogic
from megatron_implicit.schedules.model_stage import ForwardStep, ModelStage
from megatron_implicit.schedules.protocol import Limits, Message, StepPlan
from megatron_implicit.schedules.recording import Recorder
from megatron_implicit.schedules.tape import StageTape
from megatron_implicit.solver import SolveSettings


def plan_step(settings: SolveSettings, stages: int, microbatches: int, limits: Limits) -> StepPlan:
    """The plan of a step for the solve that its phase asks for."""
    unrolled = settings.gradient == "unrolled"
    passes = {"none": 0, "phantom": settings.phantom_steps, "unrolled": settings.max_iterations}[settings.gradient]
    return StepPlan(stages, microbatches, passes, limits, unrolled)


class RecirculatingSchedule:
    """Called as Megatron-Core's forward-backward functions are, for implicit models on two or more stages.

    In training mode a step solves, runs the passes with gradient and their backward passes, and finalises gradients;
    in eval mode (``forward_only``) it runs the inference solve.

    Args:
        ring: the pipeline's groups.
        limits: how much may be in flight.
        alive: told of every task that begins.
    """

    def __init__(self, ring: Ring, limits: Limits, alive: Callable[[str], None] = lambda where: None) -> None:
        self._ring, self._limits, self._alive = ring, limits, alive
        self.recorder: Optional[Recorder] = None
        """Gets the tasks of this stage from the next step on."""
        self._warm = False

    def __call__(
        self, *, forward_step_func: ForwardStep, data_iterator: Iterator[Any], model: nn.Module,
        num_microbatches: int, seq_length: int, micro_batch_size: int, forward_only: bool = False, **unused: Any,
    ) -> list[Any]:  # fmt: skip
        """Runs a step; returns the loss function's reports by microbatch on the last stage, elsewhere nothing.

        Raises:
            PipelineError, NonFiniteIterateError: as ``Driver.run``.
        """
        inner, config = getattr(model, "module", model), model.config
        device = next(inner.parameters()).device
        settings = inner.decoder.solver if inner.training else inner.decoder.inference
        if forward_only != (settings.gradient == "none"):
            raise ValueError("the model must be in training mode for a step with gradient, and in eval mode without")
        plan = plan_step(settings, self._ring.stages, num_microbatches, self._limits)
        tokens = seq_length // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        iterate = TensorSpec((tokens, micro_batch_size, config.hidden_size), torch.float32)
        with torch.set_grad_enabled(not forward_only):
            stage = ModelStage(
                inner, settings, forward_step_func, data_iterator, iterate, seq_length, num_microbatches,
                None if forward_only else config.grad_scale_func,
            )  # fmt: skip
        reports = self._run(plan, StageTape(plan, self._ring.stage, stage), device)
        if not forward_only and config.finalize_model_grads_func is not None:
            config.finalize_model_grads_func([model], None)
        return reports

    def _run(self, plan: StepPlan, tape: StageTape, device: torch.device) -> list[Any]:
        ring = self._ring
        if not self._warm:
            ring.warm(device)
            self._warm = True
        driver = Driver(
            StageLogic(plan, ring.stage), tape, GroupChannel(ring, device),
            Leadership(ring.tensor_ranks, len(Message._fields)), ring.ranks, ring.timeout_s, self.recorder,
            self._alive,
        )  # fmt: skip
        return driver.run()

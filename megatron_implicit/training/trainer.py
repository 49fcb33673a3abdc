"""The training loop: steps, and callbacks around them."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any, Optional, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron_implicit.checkpoint import TrainingState
from megatron_implicit.comm.agreement import Agreement
from megatron_implicit.config import Config
from megatron_implicit.device import current_platform
from megatron_implicit.device.collectives import observe_collectives
from megatron_implicit.device.kernels import describe
from megatron_implicit.models.decoder import FixedPointDecoder
from megatron_implicit.solver import SolveSettings
from megatron_implicit.telemetry.timing import StepClock, StepTimes, timed_as
from megatron_implicit.training.callbacks.base import Callback
from megatron_implicit.training.curriculum import Curriculum, Phase
from megatron_implicit.training.data import TrainingData
from megatron_implicit.training.health import Action, StepHealth, Verdict
from megatron_implicit.training.optimizer import TrainingParts
from megatron_implicit.training.run_folder import RunFolder
from megatron_implicit.training.step import StepResult, StepRunner
from megatron_implicit.training.validation import HeldOutLoss, measure_loss
from megatron_implicit.training.watchdog import Progress, Watchdog


@dataclass(frozen=True)
class Origin:
    """How this job came to work on the run."""

    kind: str
    """'start', 'resume' or 'branch'."""
    message: str
    """For the event log."""


@dataclass
class StepRecord:
    """Everything known about a step; callbacks complete it in their order."""

    step: int
    phase: Phase
    result: StepResult
    seconds: float
    times: StepTimes
    """What the seconds went to, on this rank."""
    validation: Optional[HeldOutLoss] = None
    metrics: Optional[dict[str, Any]] = None


class Trainer:
    """Runs a session's steps.

    Args:
        config: resolved.
        parts: wrapped model, optimizer and schedule.
        data: batches of this replica.
        folder: the run's, whose lease this job holds.
        state: where the run stands.
        origin: how this job began.
        device: where the model is.
        callbacks: in the order their hooks run.
    """

    def __init__(
        self, config: Config, parts: TrainingParts, data: TrainingData, folder: RunFolder, state: TrainingState,
        origin: Origin, device: torch.device, callbacks: Sequence[Callback],
    ) -> None:  # fmt: skip
        self.config, self.parts, self.data, self.state, self.origin = config, parts, data, state, origin
        self.device, self.callbacks = device, list(callbacks)
        self.folder, self.run_dir = folder, folder.path
        self.initial_validation: Optional[HeldOutLoss] = None
        self.progress = Progress()
        self.agreed: dict[str, int] = {}
        """What the ranks agreed on during the last step, by the names of callbacks' proposals."""
        self.save_seconds = 0.0
        """What the last checkpoint took from its beginning until it was on disk."""
        self.stop_reason: Optional[str] = None
        """Why the job ends after this step, where it was asked to."""
        self.finish_reason: Optional[str] = None
        """Why the run is finished before its last step."""
        self.health = StepHealth(config.health)
        self.health.load_state_dict(state.health)
        self._agreement, self._clock = Agreement(), StepClock()
        observe_collectives(lambda: timed_as("communication"))
        folder.on_event = self._pass_event_on
        self._curriculum = Curriculum(config)
        self._runner = StepRunner(
            config, parts, self.health, self._after_backward, self._report_health, self.progress.alive
        )

    @property
    def model(self) -> nn.Module:
        """The model without its data-parallel wrapper."""
        return self.parts.model.module

    @property
    def last_step(self) -> int:
        """The step this job ends with."""
        stop = self.config.train.stop_after_steps
        return self.config.train.steps if stop is None else min(stop, self.config.train.steps)

    @property
    def next_phase(self) -> Phase:
        """The phase of the step that comes next."""
        return self._curriculum.phase(self.state.step, self.state.consumed_tokens)

    @property
    def interrupted(self) -> bool:
        """Whether the job ends before its last step because it was asked to: it is to be started again."""
        return self.stop_reason is not None and not self.finished and self.state.step < self.last_step

    @property
    def finished(self) -> bool:
        """Whether the run, not only this job, has nothing left to do."""
        return self.finish_reason is not None or self.state.step >= self.config.train.steps

    def stop(self, reason: str) -> None:
        """Makes the step that is being completed the last of this job; all ranks must call it."""
        self.stop_reason = reason

    def finish(self, reason: str) -> None:
        """Makes the step that is being completed the last of the run; all ranks must call it."""
        self.finish_reason = reason

    def run(self) -> None:
        """Runs this job's steps.

        Raises:
            MegatronImplicitError: the run cannot go on; the message says why and what to do.
        """
        with Watchdog(
            self.config.health.hang_minutes, self.progress, self.folder.logs, self.state.attempt,
            lambda message: self.event("hang", message),
        ):  # fmt: skip
            gc.freeze()  # what is there now stays: Megatron-Core's collection at every save need not look at it
            try:
                self._run()
            finally:
                gc.unfreeze()  # or compiled modules complain, at the exit, of what Python has not given back
                for callback in self.callbacks:
                    callback.on_exit(self)

    def _run(self) -> None:
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            batches = self.data.training_batches(self.state.consumed_samples)
            while self.state.step < self.last_step and self.stop_reason is None and not self.finished:
                record = self._run_step(batches)
                for callback in self.callbacks:
                    callback.after_step(self, record)
            for callback in self.callbacks:
                callback.on_end(self)
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_failure(self, error)
            raise

    def _run_step(self, batches: Any) -> StepRecord:
        step, phase = self.state.step + 1, self.next_phase
        if isinstance(self.model.decoder, FixedPointDecoder):
            self.model.decoder.solver = SolveSettings.training(phase.solver)
        self.health.enter_phase(phase.name)
        self.progress.alive(f"step {step}")
        for callback in self.callbacks:
            callback.before_step(self, step)
        self._agreement.begin({n: v for callback in self.callbacks for n, v in callback.proposals(self).items()})
        began = time.perf_counter()
        with self._clock.step():
            result = self._runner.run(step, batches, self.device)
            with timed_as("communication"):
                self.agreed = self._agreement.end()
        self.progress.alive(f"the callbacks after step {step}")
        seconds = time.perf_counter() - began
        train = self.config.train
        self.state.step = step
        self.state.consumed_samples += train.global_batch_size
        self.state.consumed_tokens += train.global_batch_size * self.config.data.sequence_length
        return StepRecord(step, phase, result, seconds, self._clock.times)

    def _after_backward(self, step: int) -> None:
        for callback in self.callbacks:
            callback.after_backward(self, step)

    def _report_health(self, step: int, verdict: Verdict) -> None:
        """Rank 0 says what was wrong with a step and what is done about it."""
        if dist.get_rank() == 0:
            done = {Action.ACCEPT: "the update is made"}.get(verdict.action, verdict.action.name.lower())
            self.folder.warn(verdict.findings[0].kind, f"step {step}: {verdict.text}: {done}", step)

    def saved_state(self) -> TrainingState:
        """The state with every callback's, for a checkpoint."""
        self.state.layout = [dist.get_world_size(), self.config.parallel.tensor, self.config.parallel.pipeline]
        self.state.callbacks = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        self.state.health = self.health.state_dict()
        return self.state

    def restore_callbacks(self) -> None:
        """Hands callbacks the states a checkpoint held for them."""
        for callback in self.callbacks:
            callback.load_state_dict(self.state.callbacks.get(type(callback).__name__, {}))

    def record_initial_validation(self, loss: HeldOutLoss) -> None:
        """Keeps the untrained model's held-out loss, the record of step 0."""
        self.initial_validation = loss

    def measure_held_out(self) -> HeldOutLoss:
        """The held-out loss as the model stands; every rank must call it."""
        return measure_loss(
            self.model, self.data.validation_batches(), self.device, self._runner.forward_backward, self.progress.alive
        )

    def event(self, kind: str, message: str) -> None:
        """Appends a line to events.jsonl; the caller decides which rank speaks."""
        self.folder.event(kind, message, self.state.step)

    def _pass_event_on(self, event: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_event(self, event)

    def warn(self, kind: str, message: str) -> None:
        """An event that is also said aloud."""
        self.folder.warn(kind, message, self.state.step)

    def summary(self) -> str:
        """What is about to run, in a few lines."""
        config, platform = self.config, current_platform()
        parameters = sum(p.numel() for p in self.model.parameters())
        layout = f"{dist.get_world_size()} processes, tensor {config.parallel.tensor}" + (
            " with sequence parallelism" if config.parallel.sequence else ""
        )
        if config.parallel.pipeline > 1:
            stages = "+".join(map(str, config.parallel.layers_per_stage))
            layout += f", pipeline {config.parallel.pipeline} ({stages} layers)"
        return "\n".join(
            (
                f"{config.run.name}: {config.model.family}, {parameters:,} parameters on this rank, {layout}",
                f"{config.train.steps} steps of {config.train.global_batch_size} x {config.data.sequence_length} tokens"
                + "".join(f", {phase.name} from {phase.start:.0%}" for phase in config.curriculum),
                f"on {platform.name}, {platform.backend}\n{describe(platform.device_type)}",
                f"{self.origin.kind}: {self.origin.message}",
            )
        )

"""The training loop: steps, and callbacks around them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron_implicit.checkpoint import TrainingState
from megatron_implicit.config import Config
from megatron_implicit.device import current_platform
from megatron_implicit.device.collectives import observe_collectives
from megatron_implicit.device.kernels import describe
from megatron_implicit.models.decoder import FixedPointDecoder
from megatron_implicit.solver import SolveSettings
from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.timing import StepClock, StepTimes, timed_as
from megatron_implicit.training.callbacks.base import Callback
from megatron_implicit.training.curriculum import Curriculum, Phase
from megatron_implicit.training.data import TrainingData
from megatron_implicit.training.optimizer import TrainingParts
from megatron_implicit.training.step import StepResult, StepRunner
from megatron_implicit.training.validation import HeldOutLoss

EVENTS_FILE = "events.jsonl"


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
        state: where the run stands.
        origin: how this job began.
        device: where the model is.
        callbacks: in the order their hooks run.
    """

    def __init__(
        self, config: Config, parts: TrainingParts, data: TrainingData, state: TrainingState, origin: Origin,
        device: torch.device, callbacks: Sequence[Callback],
    ) -> None:  # fmt: skip
        self.config, self.parts, self.data, self.state, self.origin = config, parts, data, state, origin
        self.device, self.callbacks = device, list(callbacks)
        self.run_dir = Path(config.run.dir)
        self.initial_validation: Optional[HeldOutLoss] = None
        self._curriculum = Curriculum(config)
        self._runner = StepRunner(config, parts)
        self._clock, self._events = StepClock(), LineFile(self.run_dir / EVENTS_FILE)
        observe_collectives(lambda: timed_as("communication"))

    @property
    def model(self) -> nn.Module:
        """The model without its data-parallel wrapper."""
        return self.parts.model.module

    @property
    def run_id(self) -> str:
        """The same in all jobs of this run."""
        return self.state.run_id

    @property
    def last_step(self) -> int:
        """The step this job ends with."""
        stop = self.config.train.stop_after_steps
        return self.config.train.steps if stop is None else min(stop, self.config.train.steps)

    @property
    def next_phase(self) -> Phase:
        """The phase of the step that comes next."""
        return self._curriculum.phase(self.state.consumed_tokens)

    def run(self) -> None:
        """Runs this job's steps.

        Raises:
            MegatronImplicitError: the run cannot go on; the message says why and what to do.
        """
        try:
            self._run()
        finally:
            for callback in self.callbacks:
                callback.on_exit(self)

    def _run(self) -> None:
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            batches = self.data.training_batches(self.state.consumed_samples)
            while self.state.step < self.last_step:
                record = self._run_step(batches)
                for callback in self.callbacks:
                    callback.after_step(self, record)
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_failure(self, error)
            raise
        for callback in self.callbacks:
            callback.on_end(self)

    def _run_step(self, batches: Any) -> StepRecord:
        step, phase = self.state.step + 1, self.next_phase
        if isinstance(self.model.decoder, FixedPointDecoder):
            self.model.decoder.solver = SolveSettings.training(phase.solver)
        for callback in self.callbacks:
            callback.before_step(self, step)
        began = time.perf_counter()
        with self._clock.step():
            result = self._runner.run(step, batches, self.device)
        seconds = time.perf_counter() - began
        train = self.config.train
        self.state.step = step
        self.state.consumed_samples += train.global_batch_size
        self.state.consumed_tokens += train.global_batch_size * self.config.data.sequence_length
        return StepRecord(step, phase, result, seconds, self._clock.times)

    def saved_state(self) -> TrainingState:
        """The state with every callback's, for a checkpoint."""
        self.state.layout = [dist.get_world_size(), self.config.parallel.tensor, self.config.parallel.pipeline]
        self.state.callbacks = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        return self.state

    def restore_callbacks(self) -> None:
        """Hands callbacks the states a checkpoint held for them."""
        for callback in self.callbacks:
            callback.load_state_dict(self.state.callbacks.get(type(callback).__name__, {}))

    def record_initial_validation(self, loss: HeldOutLoss) -> None:
        """Keeps the untrained model's held-out loss, the record of step 0."""
        self.initial_validation = loss

    def event(self, kind: str, message: str) -> None:
        """Appends a line to events.jsonl; the caller decides which rank speaks."""
        line = {
            "time": time.time(),
            "step": self.state.step,
            "attempt": self.state.attempt,
            "kind": kind,
            "rank": dist.get_rank(),
            "message": message,
        }
        self._events.write(line)
        for callback in self.callbacks:
            callback.on_event(self, line)

    def summary(self) -> str:
        """What is about to run, in a few lines."""
        config, platform = self.config, current_platform()
        parameters = sum(p.numel() for p in self.model.parameters())
        layout = f"{dist.get_world_size()} processes, tensor {config.parallel.tensor}" + (
            " with sequence parallelism" if config.parallel.sequence else ""
        )
        return "\n".join(
            (
                f"{config.run.name}: {config.model.family}, {parameters:,} parameters on this rank, {layout}",
                f"{config.train.steps} steps of {config.train.global_batch_size} x {config.data.sequence_length} tokens"
                + "".join(f", {phase.name} from {phase.start:.0%}" for phase in config.curriculum),
                f"on {platform.name}, {platform.backend}\n{describe(platform.device_type)}",
                f"{self.origin.kind}: {self.origin.message}",
            )
        )

"""events.jsonl: what happened in a run, one object a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_implicit.errors import LeaseLostError, MegatronImplicitError
from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import Trainer


class Events(Callback):
    """Writes starts, resumes, branches, phase changes, errors and the end of a job. Runs last."""

    def on_start(self, trainer: "Trainer") -> None:
        self._phase = trainer.next_phase.name
        self._speaks = dist.get_rank() == 0
        if self._speaks:
            trainer.event(trainer.origin.kind, trainer.origin.message)

    def before_step(self, trainer: "Trainer", step: int) -> None:
        phase = trainer.next_phase.name
        if self._speaks and phase != self._phase:
            trainer.event("phase", f"{self._phase} -> {phase}")
        self._phase = phase

    def on_failure(self, trainer: "Trainer", error: BaseException) -> None:
        """Rank 0 reports any end; another rank only what it alone may know."""
        if isinstance(error, LeaseLostError):
            return  # the log is another job's now
        if dist.get_rank() == 0 or isinstance(error, MegatronImplicitError):
            trainer.event("error", f"{type(error).__name__}: {error}")

    def on_end(self, trainer: "Trainer") -> None:
        step, steps = trainer.state.step, trainer.config.train.steps
        reason = trainer.finish_reason or (trainer.stop_reason if trainer.interrupted else None)
        why = f" ({reason})" if reason else ""
        if self._speaks:
            trainer.event("finish" if trainer.finished else "stop", f"step {step} of {steps}{why}")

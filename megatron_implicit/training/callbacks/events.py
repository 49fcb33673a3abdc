"""events.jsonl: what happened in a run, one object a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import Trainer


class Events(Callback):
    """Writes starts, resumes, branches, phase changes and the end of a job."""

    def on_start(self, trainer: "Trainer") -> None:
        self._phase = trainer.next_phase.name
        trainer.event(trainer.origin.kind, trainer.origin.message)

    def before_step(self, trainer: "Trainer", step: int) -> None:
        phase = trainer.next_phase.name
        if phase != self._phase:
            trainer.event("phase", f"{self._phase} -> {phase}")
            self._phase = phase

    def on_end(self, trainer: "Trainer") -> None:
        done = trainer.state.step >= trainer.config.train.steps
        trainer.event("finish" if done else "stop", f"step {trainer.state.step} of {trainer.config.train.steps}")

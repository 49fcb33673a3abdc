"""Measures the held-out loss before the first step, every N steps and after the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Validation(Callback):
    """Fills ``record.validation``; the untrained model's loss becomes the record of step 0."""

    def on_start(self, trainer: "Trainer") -> None:
        if trainer.state.step == 0 and self._enabled(trainer):
            trainer.record_initial_validation(trainer.measure_held_out())

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        train = trainer.config.train
        if self._enabled(trainer) and (record.step % train.validate_every == 0 or record.step == train.steps):
            record.validation = trainer.measure_held_out()

    @staticmethod
    def _enabled(trainer: "Trainer") -> bool:
        return trainer.config.train.validate_every > 0 and trainer.data.has_validation

"""Finishes a run whose held-out loss has reached ``train.target_loss``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class TargetLoss(Callback):
    """Runs after Validation and before Checkpointing, so that the run's last checkpoint knows that it is finished."""

    def __init__(self) -> None:
        self._reached: Optional[float] = None

    def on_start(self, trainer: "Trainer") -> None:
        if self._reached is not None:
            self._judge(trainer, self._reached)

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        if record.validation is not None:
            self._judge(trainer, record.validation.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self._reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reached = state.get("reached")

    def _judge(self, trainer: "Trainer", loss: float) -> None:
        target = trainer.config.train.target_loss
        if target is not None and loss <= target:
            self._reached = loss
            trainer.finish(f"held-out loss {loss:.4g} reached train.target_loss={target:g}")

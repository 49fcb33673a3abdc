"""Saves a checkpoint every N steps and at the end of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_implicit.checkpoint import CheckpointFolder, save_checkpoint
from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Checkpointing(Callback):
    """Runs last, so that the saved state has what the other callbacks did in the step."""

    def on_start(self, trainer: "Trainer") -> None:
        self._folder = CheckpointFolder(trainer.run_dir / "checkpoints")
        self._saved_step = trainer.state.step

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        every = trainer.config.checkpoint.save_every
        if every and record.step % every == 0:
            self._save(trainer)

    def on_end(self, trainer: "Trainer") -> None:
        if self._saved_step != trainer.state.step:
            self._save(trainer)

    def _save(self, trainer: "Trainer") -> None:
        parts = trainer.parts
        folder = save_checkpoint(
            self._folder, trainer.config, trainer.saved_state(), trainer.model, parts.optimizer, parts.scheduler
        )
        self._saved_step = trainer.state.step
        if dist.get_rank() == 0:
            trainer.event("checkpoint", str(folder))
            self._folder.prune(trainer.config.checkpoint.keep_last, trainer.config.checkpoint.keep_every)

"""Saves a checkpoint every N steps and at the end of a job; a save that fails costs the run nothing but that save."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_implicit.checkpoint import CheckpointFolder, CheckpointWriter, SaveError
from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Checkpointing(Callback):
    """Runs last, so that the saved state has what the other callbacks did in the step."""

    def on_start(self, trainer: "Trainer") -> None:
        self._folder = CheckpointFolder(trainer.run_dir / "checkpoints")
        self._writer = CheckpointWriter(self._folder, trainer.config, trainer.folder.verify)
        self._saved_step = trainer.state.step
        self._began = 0.0
        if dist.get_rank() == 0:
            self._folder.remove_leftovers()
            self._prune(trainer)

    def proposals(self, trainer: "Trainer") -> dict[str, int]:
        """Whether a rank still writes."""
        return {"writing": int(not self._writer.done())}

    def after_backward(self, trainer: "Trainer", step: int) -> None:
        self._writer.finish_copy()

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        if self._writer.pending is not None and not trainer.agreed["writing"]:
            self._finish(trainer)
        checkpoint = trainer.config.checkpoint
        if any(every and record.step % every == 0 for every in (checkpoint.save_every, checkpoint.ephemeral_every)):
            self._save(trainer)

    def on_end(self, trainer: "Trainer") -> None:
        self._finish(trainer)
        if self._saved_step != trainer.state.step:
            self._save(trainer)
            self._finish(trainer)
        if self._saved_step != trainer.state.step and not trainer.interrupted:
            raise SaveError(
                f"step {trainer.state.step} could not be saved, the newest checkpoint is of step {self._saved_step}: "
                "make room on the disk and start the same command again"
            )

    def on_failure(self, trainer: "Trainer", error: BaseException) -> None:
        if hasattr(self, "_writer"):
            self._writer.abandon()

    def _save(self, trainer: "Trainer") -> None:
        self._finish(trainer)
        trainer.progress.alive(f"the beginning of checkpoint {trainer.state.step}")
        self._began = time.monotonic()
        parts = trainer.parts
        try:
            self._writer.start(trainer.saved_state(), trainer.model, parts.optimizer, parts.scheduler)
        except SaveError as error:
            self._failed(trainer, error)
        if not trainer.config.checkpoint.asynchronous:
            self._finish(trainer)

    def _finish(self, trainer: "Trainer") -> None:
        """Completes the checkpoint that is being written, waiting for it if need be."""
        step = self._writer.pending
        if step is None:
            return
        trainer.progress.alive(f"the end of writing checkpoint {step}")
        try:
            folder = self._writer.finish()
        except SaveError as error:
            return self._failed(trainer, error)
        trainer.save_seconds = time.monotonic() - self._began
        self._saved_step = step
        if dist.get_rank() == 0:
            trainer.event("checkpoint", str(folder))
            self._prune(trainer)

    def _prune(self, trainer: "Trainer") -> None:
        checkpoint, last = trainer.config.checkpoint, trainer.config.train.steps
        self._folder.prune(
            checkpoint.keep_last,
            checkpoint.keep_every,
            lambda step: step != last and not (checkpoint.save_every and step % checkpoint.save_every == 0),
        )

    def _failed(self, trainer: "Trainer", error: SaveError) -> None:
        if dist.get_rank() == 0:
            trainer.warn("save_failed", str(error))

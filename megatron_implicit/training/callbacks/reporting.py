"""Hands a step's numbers to the sinks that ``telemetry.*`` asks for."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_implicit.comm.groups import place_from_environment
from megatron_implicit.config import config_to_dict
from megatron_implicit.device import current_platform
from megatron_implicit.telemetry.sinks import Identity, SinkThreads, standard_sinks
from megatron_implicit.training.callbacks.base import Callback
from megatron_implicit.training.solver_statistics import OWN_FIELDS

from megatron.core import parallel_state  # isort: skip

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer

PATIENCE_S = 10.0
"""Seconds that a checkpoint waits for the metrics of its steps, and the end of a job for the sinks to close."""


class Reporting(Callback):
    """Runs after whatever completes ``record.metrics``. Costs the training thread a few puts into queues."""

    _over = False

    def on_start(self, trainer: "Trainer") -> None:
        identity = identity_of(trainer)
        metrics_file = trainer.folder.line_file("metrics.jsonl")
        sinks = standard_sinks(trainer.config.telemetry, identity, metrics_file)
        self._sinks = SinkThreads(
            sinks, lambda trouble: self._say(trainer, identity.rank, trouble), identity.local_rank
        )
        if trainer.initial_validation is not None and identity.rank == 0:
            self._sinks.step(
                {"step": 0, "time": time.time(), "attempt": identity.attempt, "tokens": 0,
                 "validation_loss": trainer.initial_validation.loss, "phase": trainer.next_phase.name}, {},
            )  # fmt: skip

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        own = record.result.statistics
        rank: dict[str, Any] = {
            "step": record.step,
            "rank_tokens_per_s": record.metrics["tokens_per_s"] / dist.get_world_size(),
            "rank_memory_bytes": current_platform().peak_memory_bytes(),
            **{name: own[name] for name in OWN_FIELDS if own.get(name) is not None},
        }
        self._sinks.step(record.metrics if dist.get_rank() == 0 else None, rank, record.times)

    def on_event(self, trainer: "Trainer", event: dict[str, Any]) -> None:
        if hasattr(self, "_sinks"):
            self._sinks.event(event)

    def state_dict(self) -> dict[str, Any]:
        """Before a checkpoint the steps it has are in metrics.jsonl: a resumed run does not make them again."""
        if hasattr(self, "_sinks"):
            self._sinks.flush(PATIENCE_S)
        return {}

    def on_exit(self, trainer: "Trainer") -> None:
        if hasattr(self, "_sinks"):
            self._sinks.close(PATIENCE_S)
            self._over = True

    def _say(self, trainer: "Trainer", rank: int, trouble: str) -> None:
        print(f"warning: rank {rank}: telemetry: {trouble}", file=sys.stderr, flush=True)
        if not self._over:
            trainer.event("telemetry", trouble)


def identity_of(trainer: "Trainer") -> Identity:
    """This process, as sinks name it."""
    config, place = trainer.config, place_from_environment()
    return Identity(
        run=config.run.name,
        run_id=trainer.state.run_id,
        run_dir=trainer.run_dir,
        job=os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "local",
        node=socket.gethostname(),
        rank=dist.get_rank(),
        local_rank=place.local_rank,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        attempt=trainer.state.attempt,
        first_step=trainer.state.step + 1,
        config=config_to_dict(config),
    )

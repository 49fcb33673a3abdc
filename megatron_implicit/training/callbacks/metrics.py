"""One line of metrics.jsonl a step, written by rank 0."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_implicit.config import SolverConfig
from megatron_implicit.device import current_platform
from megatron_implicit.device.peaks import peak_flops
from megatron_implicit.telemetry.flops import model_flops
from megatron_implicit.telemetry.metrics_file import MetricsWriter
from megatron_implicit.training.callbacks.base import Callback
from megatron_implicit.training.solver_statistics import FIELDS

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Metrics(Callback):
    """Aggregates solver statistics over replicas into ``record.metrics`` and appends them to the run's file."""

    def on_start(self, trainer: "Trainer") -> None:
        self._flops = model_flops(trainer.config)
        self._peak = peak_flops(current_platform().name, trainer.config.train.precision)
        self._writer = MetricsWriter(trainer.run_dir / "metrics.jsonl") if dist.get_rank() == 0 else None
        if trainer.initial_validation is not None and self._writer:
            self._writer.write(
                {"step": 0, "time": time.time(), "attempt": trainer.state.attempt, "tokens": 0,
                 "validation_loss": trainer.initial_validation.loss, "phase": trainer.next_phase.name}
            )  # fmt: skip

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        config = trainer.config
        tokens_per_step = config.train.global_batch_size * config.data.sequence_length
        solver = record.phase.solver
        statistics = dict.fromkeys(FIELDS) | record.result.statistics
        flops = self._step_flops(trainer, statistics, solver) * tokens_per_step / dist.get_world_size()
        record.metrics = {
            "step": record.step,
            "time": time.time(),
            "attempt": trainer.state.attempt,
            "tokens": trainer.state.consumed_tokens,
            "loss": record.result.loss,
            "grad_norm": record.result.grad_norm,
            "learning_rate": record.result.learning_rate,
            "phase": record.phase.name,
            **statistics,
            "step_time_s": record.seconds,
            "tokens_per_s": tokens_per_step / record.seconds,
            "model_flops_per_s": flops / record.seconds,
            "mfu": flops / record.seconds / self._peak if self._peak else None,
            "memory_bytes": current_platform().peak_memory_bytes(),
        }
        if record.validation is not None:
            record.metrics["validation_loss"] = record.validation.loss
        if self._writer:
            self._writer.write(record.metrics)

    def on_end(self, trainer: "Trainer") -> None:
        if self._writer:
            self._writer.close()

    def _step_flops(self, trainer: "Trainer", statistics: dict[str, Any], solver: SolverConfig) -> float:
        if not trainer.config.implicit or solver.gradient == "unrolled":
            return self._flops.of_phase(solver, trainer.config.implicit)
        return self._flops.training(statistics["evaluations_mean"], solver.phantom_steps)

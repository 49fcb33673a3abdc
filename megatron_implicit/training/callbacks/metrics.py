"""The numbers of a step, for everyone who reports them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_implicit.config import SolverConfig
from megatron_implicit.device import current_platform
from megatron_implicit.device.peaks import peak_flops
from megatron_implicit.telemetry.flops import model_flops
from megatron_implicit.training.callbacks.base import Callback
from megatron_implicit.training.solver_statistics import FIELDS

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Metrics(Callback):
    """Fills ``record.metrics``, as metrics.jsonl has them."""

    def on_start(self, trainer: "Trainer") -> None:
        self._flops = model_flops(trainer.config)
        self._peak = peak_flops(current_platform().name, trainer.config.train.precision)

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        config = trainer.config
        tokens_per_step = config.train.global_batch_size * config.data.sequence_length
        statistics = {name: record.result.statistics.get(name) for name in FIELDS}
        flops = self._step_flops(trainer, statistics, record.phase.solver) * tokens_per_step / dist.get_world_size()
        record.metrics = {
            "step": record.step,
            "time": time.time(),
            "attempt": trainer.state.attempt,
            "ranks": dist.get_world_size(),
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
        if record.result.skipped:
            record.metrics["skipped"] = True

    def _step_flops(self, trainer: "Trainer", statistics: dict[str, Any], solver: SolverConfig) -> float:
        if not trainer.config.implicit or solver.gradient == "unrolled":
            return self._flops.of_phase(solver, trainer.config.implicit)
        return self._flops.training(statistics["evaluations_mean"], solver.phantom_steps)

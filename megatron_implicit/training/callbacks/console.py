"""The terminal: a progress bar where there is a terminal, a line every N steps everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Console(Callback):
    """Rank 0 prints what matters of a step: loss, evaluations, residual, throughput."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def on_start(self, trainer: "Trainer") -> None:
        if dist.get_rank() != 0:
            return
        self._terminal = Terminal(highlight=False, soft_wrap=True)
        self._terminal.print(trainer.summary())
        if trainer.initial_validation is not None:
            self._terminal.print(f"step 0  held-out loss {trainer.initial_validation.loss:.4f}")
        if self._terminal.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self._terminal)
            self._task = self._bar.add_task("", total=trainer.last_step, completed=trainer.state.step, note="")
            self._bar.start()

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        if dist.get_rank() != 0:
            return
        if self._bar:
            self._bar.update(
                self._task, completed=record.step, note=f"loss {record.result.loss:.3f} · {record.phase.name}"
            )
        last = record.step == trainer.last_step
        if record.step % trainer.config.telemetry.console_every == 0 or record.validation is not None or last:
            self._terminal.print(step_line(record.metrics, trainer.config.train.steps))

    def on_failure(self, trainer: "Trainer", error: BaseException) -> None:
        self.on_end(trainer)

    def on_end(self, trainer: "Trainer") -> None:
        if self._bar:
            self._bar.stop()


def step_line(metrics: dict[str, Any], steps: int) -> str:
    """A step in one line."""
    width = len(str(steps))
    parts = [f"step {metrics['step']:>{width}}/{steps}", metrics["phase"], f"loss {metrics['loss']:.4f}"]
    if "validation_loss" in metrics:
        parts.append(f"held-out {metrics['validation_loss']:.4f}")
    if metrics["evaluations_mean"] is not None:
        parts.append(f"evaluations {metrics['evaluations_mean']:.1f}")
    if metrics["residual_mean"] is not None:
        parts.append(f"residual {metrics['residual_mean']:.3g}")
    parts += [f"grad {metrics['grad_norm']:.2f}", f"lr {metrics['learning_rate']:.2e}"]
    parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    return "  ".join(parts)

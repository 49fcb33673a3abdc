"""Made-up runs."""

from __future__ import annotations

from typing import Any


def record(step: int, **fields: Any) -> dict[str, Any]:
    """What every step's line holds."""
    values = {
        "step": step, "time": 1e9 + step, "attempt": 0, "tokens": 1000 * step, "loss": 8.0 - step / 100,
        "grad_norm": 1.0, "learning_rate": 1e-3, "phase": "main", "step_time_s": 0.5, "tokens_per_s": 2000.0,
    }  # fmt: skip
    return values | fields


def solver_fields(evaluations: float, residual: float) -> dict[str, Any]:
    """What an implicit model's line holds too."""
    return {
        "iterations_mean": evaluations - 0.5, "iterations_max": evaluations, "evaluations_mean": evaluations,
        "evaluations_max": evaluations + 2, "residual_mean": residual, "residual_max": 2 * residual,
        "unconverged_fraction": 0.25,
    }  # fmt: skip


def implicit_run(steps: int = 40) -> list[dict[str, Any]]:
    """Step 0, then a bounded phase of three quarters and a free one."""
    start = {"step": 0, "time": 1e9, "attempt": 0, "tokens": 0, "validation_loss": 8.3, "phase": "bounded"}
    records: list[dict[str, Any]] = [start]
    for step in range(1, steps + 1):
        fields = {"phase": "free", **solver_fields(9, 0.04)}
        if step <= steps * 3 // 4:
            fields = {"phase": "bounded", **solver_fields(4, 0.2), "unconverged_fraction": None}
        if step % 10 == 0:
            fields["validation_loss"] = 8.1 - step / 100
        records.append(record(step, **fields))
    return records

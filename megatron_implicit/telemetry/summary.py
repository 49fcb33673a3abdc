"""A run in a few numbers, by phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Iterable, Optional


@dataclass(frozen=True)
class PhaseSummary:
    """The steps of one phase of the curriculum. What an explicit model does not have is None."""

    name: str
    first_step: int
    last_step: int
    loss: float
    """Training loss of the last step, nats a token."""
    evaluations: Optional[float]
    """Mean passes of F without gradient in a solve."""
    evaluations_max: Optional[float]
    """Most evaluations a sample's solve took."""
    residual: Optional[float]
    """Mean relative residual of the accepted iterates."""
    unconverged: Optional[float]
    """Mean share of samples that did not reach the tolerance; None also where there is no tolerance."""
    tokens_per_s: float
    """Tokens of the phase by its time in steps, whole job."""


@dataclass(frozen=True)
class RunSummary:
    """A whole run."""

    steps: int
    tokens: int
    seconds: float
    """Time in steps: validation and checkpoints are not in it."""
    phases: list[PhaseSummary]
    first_validation_loss: Optional[float]
    """Held-out loss of the earliest measurement: the untrained model's where the run measured at step 0."""
    last_validation_loss: Optional[float]


def summarize(records: list[dict[str, Any]]) -> RunSummary:
    """The summary of ``read_metrics``'s records (step 0, where there is one, is the untrained model)."""
    steps = [record for record in records if record["step"] > 0]
    validation = [record["validation_loss"] for record in records if record.get("validation_loss") is not None]
    phases = [_summarize_phase(name, list(group)) for name, group in groupby(steps, lambda record: record["phase"])]
    return RunSummary(
        steps=steps[-1]["step"] if steps else 0,
        tokens=steps[-1]["tokens"] if steps else 0,
        seconds=sum(record["step_time_s"] for record in steps),
        phases=phases,
        first_validation_loss=validation[0] if validation else None,
        last_validation_loss=validation[-1] if validation else None,
    )


def _summarize_phase(name: str, records: list[dict[str, Any]]) -> PhaseSummary:
    tokens = sum(record["tokens_per_s"] * record["step_time_s"] for record in records)
    seconds = sum(record["step_time_s"] for record in records)
    losses = [record["loss"] for record in records if record["loss"] is not None]
    return PhaseSummary(
        name=name,
        first_step=records[0]["step"],
        last_step=records[-1]["step"],
        loss=losses[-1] if losses else math.nan,
        evaluations=_mean(record.get("evaluations_mean") for record in records),
        evaluations_max=max((value for r in records if (value := r.get("evaluations_max")) is not None), default=None),
        residual=_mean(record.get("residual_mean") for record in records),
        unconverged=_mean(record.get("unconverged_fraction") for record in records),
        tokens_per_s=tokens / seconds if seconds else 0.0,
    )


def _mean(values: Iterable[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""Which numbers are drawn together: the same panels on the page, in the report and in Grafana."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_implicit.telemetry.catalogue import RANK_METRICS, RUN_METRICS
from megatron_implicit.telemetry.timing import PARTS


@dataclass(frozen=True)
class Panel:
    """One chart over steps."""

    name: str
    title: str
    unit: str
    series: tuple[str, ...]
    """Keys of ``RUN_METRICS``."""
    logarithmic: bool = False
    from_zero: bool = False
    smooth: bool = False
    """The first series is noisy: a running mean is drawn over it."""
    stacked: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    """Words for series whose title would repeat the panel's."""
    meaning: str = ""
    """Beyond what its series mean."""


PANELS: tuple[Panel, ...] = (
    Panel("loss", "Loss", "nats/token", ("loss", "validation_loss"), smooth=True,
          labels={"loss": "training", "validation_loss": "held out"}),
    Panel("evaluations", "Evaluations of F a solve", "", ("evaluations_mean", "evaluations_p50", "evaluations_p99",
          "evaluations_max"), from_zero=True,
          labels={"evaluations_mean": "mean", "evaluations_p50": "median", "evaluations_p99": "99%",
                  "evaluations_max": "most"}),
    Panel("residual", "Residual of accepted iterates", "", ("residual_mean", "residual_p50", "residual_p99",
          "residual_max"), logarithmic=True,
          labels={"residual_mean": "mean", "residual_p50": "median", "residual_p99": "99%", "residual_max": "largest"}),
    Panel("unconverged", "Unconverged samples", "share", ("unconverged_fraction",), from_zero=True),
    Panel("throughput", "Throughput", "tokens/s", ("tokens_per_s",), from_zero=True, smooth=True),
    Panel("flops", "Model FLOP/s a device", "FLOP/s", ("model_flops_per_s",), from_zero=True, smooth=True),
    Panel("mfu", "MFU", "share", ("mfu",), from_zero=True, smooth=True),
    Panel("time", "Where a step's time goes (rank 0)", "s", tuple(f"time_{part}_s" for part in PARTS), from_zero=True,
          stacked=True, labels={f"time_{part}_s": part.replace("_", " ") for part in PARTS},
          meaning="Parts of a step on rank 0, added up. Communication has the wait for slower ranks in it."),
    Panel("grad_norm", "Gradient norm", "", ("grad_norm",), logarithmic=True, smooth=True),
    Panel("learning_rate", "Learning rate", "", ("learning_rate",), from_zero=True),
    Panel("token_residual", "Residual of single tokens (rank 0)", "", ("token_residual_p50", "token_residual_p99",
          "token_residual_p100"), logarithmic=True,
          labels={"token_residual_p50": "median", "token_residual_p99": "99%", "token_residual_p100": "largest"}),
    Panel("memory", "Peak memory (rank 0)", "bytes", ("memory_bytes",), from_zero=True),
)  # fmt: skip

SERIES: tuple[str, ...] = tuple(dict.fromkeys(key for panel in PANELS for key in panel.series))
"""All keys that are drawn."""


def described_panels() -> dict[str, Any]:
    """Panels and meanings, for the page."""
    metrics = {name: asdict(metric) for name, metric in (RUN_METRICS | RANK_METRICS).items()}
    for part in PARTS:
        metrics[f"time_{part}_s"] = metrics[f"{part}_s"]
    return {"panels": [asdict(panel) for panel in PANELS], "metrics": metrics, "parts": list(PARTS)}

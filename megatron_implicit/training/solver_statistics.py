"""Solver statistics of a step, over all replicas, as metrics.jsonl has them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.solver import SolveTrace
from megatron_implicit.solver.trace import QUANTILES

from megatron.core import parallel_state  # isort: skip

FIELDS = (
    "iterations_mean", "iterations_max", "evaluations_mean", "evaluations_p50", "evaluations_p99", "evaluations_max",
    "evaluations_skew", "residual_mean", "residual_p50", "residual_p90", "residual_p99", "residual_max",
    *(f"token_residual_p{round(100 * q)}" for q in QUANTILES), "unconverged_fraction",
)  # fmt: skip
"""Names of the statistics; all null in explicit models."""

OWN_FIELDS = tuple(
    f"own_{name}" for name in (
        "evaluations_mean", "evaluations_p50", "evaluations_p99", "evaluations_max",
        "residual_p50", "residual_p90", "residual_p99", "unconverged_fraction",
    )
)  # fmt: skip
"""The same of this replica alone."""

Statistics = dict[str, float | None]


def solver_statistics(traces: list[SolveTrace], tolerance: float, device: torch.device) -> Statistics:
    """Statistics of a step; every rank must call it.

    Read where the step waits for the device anyway: they cost one small collective and no wait of their own.

    Args:
        traces: of this replica's microbatches.
        tolerance: of the solves; without one nothing can be unconverged. An unrolled phase has no residuals.
        device: of the collective.

    Returns:
        by FIELDS and OWN_FIELDS: over all samples of all replicas; ``evaluations_skew``, by how much the replicas' mean
        evaluations
        differ; ``token_residual``'s quantiles over the tokens this rank holds.
    """
    values = torch.stack([_all(traces, name).to(torch.float64) for name in _OF_SAMPLES]).to(device)
    replicas = [torch.empty_like(values) for _ in range(parallel_state.get_data_parallel_world_size())]
    dist.all_gather(replicas, values, group=parallel_state.get_data_parallel_group())
    by_replica = torch.stack(replicas).tolist()  # [replicas, 4, samples of one]
    iterations, evaluations, residuals, converged = (sum(rows, []) for rows in zip(*by_replica))
    evaluations_of_replicas = [_mean(rows[1]) for rows in by_replica]
    statistics = {
        "iterations_mean": _mean(iterations),
        "iterations_max": max(iterations),
        **_distribution("evaluations", evaluations, (0.5, 0.99)),
        "evaluations_skew": max(evaluations_of_replicas) - min(evaluations_of_replicas),
        **_distribution("residual", residuals, (0.5, 0.9, 0.99)),
        **{f"token_residual_p{round(100 * q)}": value for q, value in zip(QUANTILES, _token_quantiles(traces))},
        "unconverged_fraction": 1 - _mean(converged) if tolerance > 0 else None,
    }
    own = by_replica[parallel_state.get_data_parallel_rank()]
    statistics |= {f"own_{name}": value for name, value in _distribution("evaluations", own[1], (0.5, 0.99)).items()}
    statistics |= {f"own_{name}": value for name, value in _distribution("residual", own[2], (0.5, 0.9, 0.99)).items()}
    statistics["own_unconverged_fraction"] = 1 - _mean(own[3]) if tolerance > 0 else None
    return {name: _number(statistics[name]) for name in (*FIELDS, *OWN_FIELDS)}


_OF_SAMPLES = ("iterations", "evaluations", "accepted_residuals", "converged")


def _all(traces: list[SolveTrace], name: str) -> Tensor:
    return torch.cat([getattr(trace, name) for trace in traces])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _distribution(name: str, values: list[float], quantiles: tuple[float, ...]) -> dict[str, float]:
    """Mean, quantiles (of the nearest rank) and maximum."""
    ordered = sorted(values)
    if any(math.isnan(value) for value in values):
        ordered = [math.nan] * len(values)
    found = {f"{name}_p{round(100 * q)}": ordered[math.ceil(q * len(ordered)) - 1] for q in quantiles}
    return {f"{name}_mean": _mean(values), **found, f"{name}_max": ordered[-1]}


def _token_quantiles(traces: list[SolveTrace]) -> list[float]:
    tokens = [trace.token_residuals.flatten() for trace in traces if trace.token_residuals is not None]
    if not tokens:
        return [float("nan")] * len(QUANTILES)
    ordered = torch.cat(tokens).sort().values  # torch.quantile refuses more than 16 million values
    places = [round(q * (len(ordered) - 1)) for q in QUANTILES]
    return ordered[places].tolist()


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or value != value else value

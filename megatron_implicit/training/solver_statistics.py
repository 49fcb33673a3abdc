"""Solver statistics of a step, over all replicas, as metrics.jsonl has them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.comm.reductions import from_last_stage
from megatron_implicit.solver import SolveSettings, SolveTrace
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


def solver_statistics(traces: list[SolveTrace], solver: SolveSettings, device: torch.device) -> Statistics:
    """Statistics of a step, the same on all pipeline stages; every rank must call it.

    Read where the step waits for the device anyway: they cost one small collective and no wait of their own.

    Args:
        traces: of this replica's microbatches, on the last stage, which tells the others.
        solver: of the solves; without a tolerance nothing can be unconverged, nor in an unrolled phase, which solves
            nothing and has no residuals.
        device: of the collectives.

    Returns:
        by FIELDS and OWN_FIELDS: over all samples of all replicas; ``evaluations_skew``, by how much the replicas' mean
        evaluations differ; ``token_residual``'s quantiles over the tokens that the last stage's rank holds.
    """
    stages, names = parallel_state.get_pipeline_model_parallel_group(), (*FIELDS, *OWN_FIELDS)
    values = torch.empty(len(names), dtype=torch.float64)
    if stages.rank() == stages.size() - 1:
        measured = _measured(traces, device)
        values = torch.tensor([measured[name] for name in names], dtype=torch.float64)
    if stages.size() > 1:
        values = from_last_stage(values.to(device), stages)
    statistics: Statistics = dict(zip(names, values.tolist()))
    if not solver.tolerance > 0 or solver.gradient == "unrolled":
        statistics["unconverged_fraction"] = statistics["own_unconverged_fraction"] = None
    return {name: _number(value) for name, value in statistics.items()}


def _measured(traces: list[SolveTrace], device: torch.device) -> dict[str, float]:
    values = torch.stack([_all(traces, name).to(torch.float64) for name in _OF_SAMPLES]).to(device)
    replicas = [torch.empty_like(values) for _ in range(parallel_state.get_data_parallel_world_size())]
    dist.all_gather(replicas, values, group=parallel_state.get_data_parallel_group())
    by_replica = torch.stack(replicas).tolist()  # [replicas, 4, samples of one]
    iterations, evaluations, residuals, converged = (sum(rows, []) for rows in zip(*by_replica))
    means = [_mean(rows[1]) for rows in by_replica]
    own = by_replica[parallel_state.get_data_parallel_rank()]
    own_values = _distribution("evaluations", own[1]) | _distribution("residual", own[2])
    return {
        "iterations_mean": _mean(iterations),
        "iterations_max": max(iterations),
        **_distribution("evaluations", evaluations),
        "evaluations_skew": max(means) - min(means),
        **_distribution("residual", residuals),
        **{f"token_residual_p{round(100 * q)}": value for q, value in zip(QUANTILES, _token_quantiles(traces))},
        "unconverged_fraction": 1 - _mean(converged),
        **{f"own_{name}": value for name, value in own_values.items()},
        "own_unconverged_fraction": 1 - _mean(own[3]),
    }


_OF_SAMPLES = ("iterations", "evaluations", "accepted_residuals", "converged")


def _all(traces: list[SolveTrace], name: str) -> Tensor:
    return torch.cat([getattr(trace, name) for trace in traces])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _distribution(name: str, values: list[float]) -> dict[str, float]:
    """Mean, quantiles (of the nearest rank) and maximum."""
    ordered = sorted(values)
    if any(math.isnan(value) for value in values):
        ordered = [math.nan] * len(values)
    found = {f"{name}_p{round(100 * q)}": ordered[math.ceil(q * len(ordered)) - 1] for q in (0.5, 0.9, 0.99)}
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

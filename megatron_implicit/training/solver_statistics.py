"""Solver statistics of a step, over all replicas, as metrics.jsonl has them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.comm.reductions import from_last_stage
from megatron_implicit.solver import SolveTrace
from megatron_implicit.solver.trace import QUANTILES

from megatron.core import parallel_state  # isort: skip

FIELDS = (
    "iterations_mean", "iterations_max", "evaluations_mean", "evaluations_max", "evaluations_skew",
    "residual_mean", "residual_max", *(f"token_residual_p{round(100 * q)}" for q in QUANTILES), "unconverged_fraction",
)  # fmt: skip
"""Names of the statistics; all null in explicit models."""


def solver_statistics(traces: list[SolveTrace], tolerance: float, device: torch.device) -> dict[str, float | None]:
    """Statistics of a step, the same on all pipeline stages; every rank must call it.

    Args:
        traces: of this replica's microbatches, on the last stage, which tells the others.
        tolerance: of the solves; without one nothing can be unconverged. An unrolled phase has no residuals.
        device: of the collectives.

    Returns:
        by FIELDS: means and maxima over all samples of all replicas; ``evaluations_skew``, by how much the replicas'
        mean evaluations differ; quantiles over the tokens this rank holds.
    """
    stages = parallel_state.get_pipeline_model_parallel_group()
    values = torch.empty(len(FIELDS), dtype=torch.float64)
    if stages.rank() == stages.size() - 1:
        values = torch.tensor(_measured(traces, device), dtype=torch.float64)
    statistics = dict(zip(FIELDS, from_last_stage(values.to(device), stages).tolist()))
    if not tolerance > 0:
        statistics["unconverged_fraction"] = None
    return {name: _number(value) for name, value in statistics.items()}


def _measured(traces: list[SolveTrace], device: torch.device) -> list[float]:
    """In the order of FIELDS."""
    values = torch.stack(
        [
            torch.cat([trace.iterations for trace in traces]).double(),
            torch.cat([trace.evaluations for trace in traces]).double(),
            torch.cat([trace.accepted_residuals for trace in traces]).double(),
            torch.cat([~trace.converged for trace in traces]).double(),
        ]
    ).to(device)
    own_means, peaks = values.mean(dim=1), values.amax(dim=1)
    means, highest, skew = _over_replicas(own_means, peaks)
    counts = [means[0], highest[0], means[1], highest[1], skew]
    return [*counts, means[2], highest[2], *_token_quantiles(traces), means[3]]


def _over_replicas(own_means: Tensor, peaks: Tensor) -> tuple[list[float], list[float], float]:
    """(means, maxima, spread of the mean evaluations); replicas have equally many samples."""
    group = parallel_state.get_data_parallel_group()
    lowest = torch.stack((own_means[1], -own_means[1]))
    means = own_means.clone()
    dist.all_reduce(means, group=group)
    peaks = torch.cat((peaks, lowest))
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=group)
    *highest, largest, negative_smallest = peaks.tolist()
    return (means / group.size()).tolist(), highest, largest + negative_smallest


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

"""Statistics of several solves as those of one sequence."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.solver import SolveTrace


def merge_by_token(traces: list[tuple[int, SolveTrace]], lengths: Optional[Sequence[int]] = None) -> SolveTrace:
    """(tokens, trace by sample) of consecutive chunks -> one trace by token: each token has its chunk's statistics.

    Args:
        lengths: [b] tokens of each sample; the padding after them counts as converged without evaluations.
    """
    longest = max(trace.residuals.shape[-1] for _, trace in traces)

    def by_token(name: str) -> Tensor:
        return torch.cat([getattr(trace, name)[:, None].expand(-1, tokens) for tokens, trace in traces], dim=1)

    residuals = torch.cat([_padded(trace.residuals, longest, tokens) for tokens, trace in traces], dim=1)
    merged = {name: by_token(name) for name in ("iterations", "evaluations", "converged")}
    if lengths is not None:
        device = merged["iterations"].device
        padding = torch.arange(residuals.shape[1], device=device) >= torch.tensor(lengths, device=device)[:, None]
        merged = {name: values.masked_fill(padding, name == "converged") for name, values in merged.items()}
        residuals = residuals.masked_fill(padding[:, :, None], float("nan"))
    return SolveTrace(residuals=residuals, **merged)


def _padded(residuals: Tensor, evaluations: int, tokens: int) -> Tensor:
    """[b, evaluations of the chunk] -> [b, tokens, evaluations]."""
    padded = F.pad(residuals, (0, evaluations - residuals.shape[-1]), value=float("nan"))
    return padded[:, None].expand(-1, tokens, -1)

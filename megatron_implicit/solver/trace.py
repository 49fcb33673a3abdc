"""What a solve reports about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class SolveTrace:
    """Solver statistics by sample [b]; by token [b, s] after a sequential or chunked solve."""

    iterations: Tensor
    """Evaluation whose result was accepted, counted from 1: the best one in training, the last in inference."""
    evaluations: Tensor
    """Evaluations of F the solve executed; phantom passes and the output pass are not counted."""
    residuals: Tensor
    """Relative residual of every evaluation, [..., evaluations]; NaN after a sample has stopped."""
    converged: Tensor
    """Whether the accepted residual is below the tolerance."""
    broken_at: Tensor | None = None
    """Pass, counted from 1 and passes with gradient included, in which a sample became NaN or infinite; 0: never."""
    token_residuals: Tensor | None = None
    """[s, b] residuals of single tokens at the last evaluation, for the tokens this rank holds."""

    @property
    def accepted_residuals(self) -> Tensor:
        """Residual of the accepted evaluation, shaped as ``iterations``."""
        index = (self.iterations - 1).clamp(0, self.residuals.shape[-1] - 1).unsqueeze(-1).long()
        return self.residuals.gather(-1, index).squeeze(-1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "SolveTrace":
        """The trace with another order of samples or tokens, which ``function`` gives every table."""
        return SolveTrace(
            *(function(table) for table in (self.iterations, self.evaluations, self.residuals, self.converged))
        )

    def token_quantiles(self) -> dict[str, float]:
        """Median, 90%, 99% and largest residual of the tokens this rank holds, at the last evaluation."""
        if self.token_residuals is None:
            return {}
        values = torch.quantile(self.token_residuals.flatten().float().cpu(), torch.tensor(QUANTILES))
        return {f"p{round(100 * q)}": float(value) for q, value in zip(QUANTILES, values)}

    @staticmethod
    def explicit(batch: int) -> "SolveTrace":
        """The trace of a model that is evaluated once."""
        ones = torch.ones(batch, dtype=torch.long)
        return SolveTrace(ones, ones, torch.zeros(batch, 1), torch.ones(batch, dtype=torch.bool))

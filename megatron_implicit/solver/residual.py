"""Norms of one evaluation: relative residuals a sample (or for the whole batch), and a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

import torch
from torch import Tensor

from megatron_implicit.solver.settings import SolveSettings

Reduce = Callable[[Tensor], Tensor]
"""Makes sums of squares [2, b] (or [2, s, b], by token) the same on all ranks that share the iterate."""


@dataclass(frozen=True)
class Residual:
    """Relative residuals of one evaluation."""

    sample: Tensor
    """[b], reduced over the ranks that shard the iterate; every entry the same under the batch norm, that of the most
    restless token under the token norm."""
    token: Tensor
    """[s, b] of the tokens this rank holds."""


def relative_residual(
    image: Tensor, iterate: Tensor, settings: SolveSettings, reduce: Reduce, counting: Optional[Tensor] = None
) -> Residual:
    """||F(z) - z|| / (||F(z)|| or ||z|| + epsilon), by sample and by token.

    Args:
        image: F(z), [s, b, h] float32.
        iterate: z, [s, b, h].
        settings: which divisor, epsilon and norm.
        reduce: sums the squares over the ranks that share the iterate.
        counting: [s, b] 1 for a token of the sample, 0 for its padding; None counts all.
    """
    if settings.norm == "token":
        token = token_residual(image, iterate, settings, reduce)
        return Residual(sample=(token if counting is None else token * counting).amax(0), token=token)
    difference, size = _token_norms(image, iterate, settings)
    if counting is not None:
        difference, size = difference * counting, size * counting
    sums = reduce(torch.stack((difference, size)).square_().sum(dim=1))
    if settings.norm == "batch":
        sums = sums.sum(dim=1, keepdim=True).expand_as(sums)
    root = sums.sqrt()
    return Residual(sample=root[0] / (root[1] + settings.epsilon), token=difference.div_(size + settings.epsilon))


def token_residual(image: Tensor, iterate: Tensor, settings: SolveSettings, reduce: Reduce) -> Tensor:
    """The same by token, [s, b], for solves that decide by token: equal on all ranks that share the iterate."""
    norms = reduce(torch.stack(_token_norms(image, iterate, settings)).square_()).sqrt()
    return norms[0] / (norms[1] + settings.epsilon)


def _token_norms(image: Tensor, iterate: Tensor, settings: SolveSettings) -> tuple[Tensor, Tensor]:
    """||F(z) - z|| and the divisor without its epsilon, [s, b]."""
    scale = image if settings.relative_to == "image" else iterate
    return torch.linalg.vector_norm(image - iterate, dim=-1), torch.linalg.vector_norm(scale, dim=-1)

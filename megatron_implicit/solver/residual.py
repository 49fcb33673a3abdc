"""Norms of one evaluation: relative residuals a sample (or for the whole batch), and a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from megatron_implicit.solver.settings import SolveSettings

Reduce = Callable[[Tensor], Tensor]
"""Makes sums of squares [2, b] the same on all ranks that share the iterate."""


@dataclass(frozen=True)
class Residual:
    """Relative residuals of one evaluation."""

    sample: Tensor
    """[b], reduced over the ranks that shard the iterate; every entry the same under the batch norm."""
    token: Tensor
    """[s, b] of the tokens this rank holds."""


def relative_residual(image: Tensor, iterate: Tensor, settings: SolveSettings, reduce: Reduce) -> Residual:
    """||F(z) - z|| / (||F(z)|| or ||z|| + epsilon), by sample and by token.

    Args:
        image: F(z), [s, b, h] float32.
        iterate: z, [s, b, h].
        settings: which divisor, epsilon and norm.
        reduce: sums the squares over the ranks that share the iterate.
    """
    scale = image if settings.relative_to == "image" else iterate
    difference = torch.linalg.vector_norm(image - iterate, dim=-1)
    size = torch.linalg.vector_norm(scale, dim=-1)
    sums = reduce(torch.stack((difference, size)).square_().sum(dim=1))
    if settings.norm == "batch":
        sums = sums.sum(dim=1, keepdim=True).expand_as(sums)
    root = sums.sqrt()
    return Residual(sample=root[0] / (root[1] + settings.epsilon), token=difference.div_(size + settings.epsilon))

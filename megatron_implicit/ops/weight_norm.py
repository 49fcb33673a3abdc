"""Weight norm (arXiv 1602.07868) on the rows of a matrix, whose columns may be shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_implicit.ops.precision import compute_dtype


def weight_norm(v: Tensor, g: Tensor, *, reduce: Optional[Callable[[Tensor], Tensor]] = None) -> Tensor:
    """W = v · (g / ‖v‖), one norm for each row.

    Args:
        v: [rows, ...] directions; the norm of a row is over all its other dimensions.
        g: [rows] lengths.
        reduce: for v sharded along its columns: the sum over the ranks that share a row, differentiable, applied to
            ‖v‖² [rows].

    Returns:
        W, shaped and typed as v; computed in float32 (float64 if v is). A row of zeros gives zeros.
    """
    dtype = compute_dtype(v)
    squares = row_norms(v).square()
    if reduce is not None:
        squares = reduce(squares)
    # A row that only pads a dimension may be zero: the bound keeps 0/0 out of it and out of its gradient.
    return _ScaledRows.apply(v, g.to(dtype) / squares.clamp_min(torch.finfo(dtype).tiny).sqrt())


def row_norms(v: Tensor) -> Tensor:
    """‖v‖ of every row [rows], in float32 (float64 if v is): the gains with which weight norm leaves v as it is."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=compute_dtype(v))


class _ScaledRows(torch.autograd.Function):
    """v · scale by rows. Keeps v itself for the backward pass, where autograd would keep a float32 copy of it."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(v, scale)
        return (v.to(scale.dtype) * _by_row(scale, v)).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        v, scale = ctx.saved_tensors
        gradient = gradient.to(scale.dtype)
        return (gradient * _by_row(scale, v)).to(v.dtype), (gradient * v.to(scale.dtype)).flatten(1).sum(1)


def _by_row(scale: Tensor, v: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (v.dim() - 1))

"""Weight norm (arXiv 1602.07868) on the rows of a matrix, whose columns may be shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

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
    values = v.to(dtype)
    squares = values.flatten(1).square().sum(1)
    if reduce is not None:
        squares = reduce(squares)
    # A row that only pads a dimension may be zero: the bound keeps 0/0 out of it and out of its gradient.
    scale = g.to(dtype) / squares.clamp_min(torch.finfo(dtype).tiny).sqrt()
    return (values * scale.view(-1, *[1] * (v.dim() - 1))).to(v.dtype)

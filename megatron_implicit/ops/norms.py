"""Root-mean-square norms: x · rsqrt(mean x² + eps) · w (arXiv 1910.07467), plain and gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.device.kernels import find_kernels
from megatron_implicit.ops.precision import compute_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out_dtype: torch.dtype) -> Tensor:
    """weight · rms(x) over the last dimension.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.
        out_dtype: dtype of the result; inside it is float32 (float64 if x is).

    Returns:
        [..., d].
    """
    dtype = compute_dtype(x)
    return _normed(x.to(dtype), weight.to(dtype), eps).to(out_dtype)


def gated_rms_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    group_size: int,
    eps: float,
    reduce: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """weight · rms(y · silu(gate)) over each group of channels: Mamba2's norm, the gate *before* the norm.

    Args:
        y, gate: [..., d] this rank's channels.
        weight: [d].
        group_size: channels that are normed together, counted over all ranks. Either d holds whole groups, or
            (d < group_size) all of d belongs to one group that spans the tensor group.
        eps: added to the mean square.
        reduce: sum over the tensor group, differentiable; applied to the sums of squares [..., 1] of a group that
            spans it.

    Returns:
        [..., d] in float32 (float64 if y is): the caller rounds.

    Raises:
        ValueError: d neither holds whole groups nor is part of one that ``reduce`` completes.
    """
    d = y.shape[-1]
    spans = d < group_size
    if (spans and reduce is None) or (not spans and d % group_size):
        raise ValueError(
            f"gated_rms_norm: {d} channels with group_size {group_size}: pass whole groups, or a part of one and "
            "`reduce`, the sum over the tensor group"
        )
    dtype = compute_dtype(y)
    values, weight = y.to(dtype) * F.silu(gate.to(dtype)), weight.to(dtype)
    if spans:
        return values * torch.rsqrt(reduce(_sum_of_squares(values)) / group_size + eps) * weight
    if d == group_size:
        return _normed(values, weight, eps)
    return _normed(values.unflatten(-1, (-1, group_size)), None, eps).flatten(-2) * weight


def _normed(values: Tensor, weight: Optional[Tensor], eps: float) -> Tensor:
    """values [..., d] over their root mean square, times weight [d]."""
    d = values.shape[-1]
    if find_kernels(values.device.type).norm == "fused":
        return F.rms_norm(values, (d,), weight, eps)
    normed = values * torch.rsqrt(_sum_of_squares(values) / d + eps)
    return normed if weight is None else normed * weight


def _sum_of_squares(values: Tensor) -> Tensor:
    """[..., d] -> [..., 1]; x·x and not x², whose backward pass is slower."""
    return (values * values).sum(-1, keepdim=True)

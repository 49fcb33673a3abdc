"""Causal softmax attention, through torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: Optional[float] = None, visible: Optional[Tensor] = None
) -> Tensor:
    """softmax(scale · q kᵀ) v, where a query sees the keys up to its own position.

    Args:
        q: [s, b, n, d] queries, at the *last* s of the t positions (the keys before them come from a cache).
        k, v: [t, b, m, d] keys and values, t >= s; with m < n heads, each serves n / m consecutive query heads.
        scale: factor of the scores; None is 1 / √d.
        visible: [b, s, t] bool, the keys that each query sees where samples stand at different positions; every query
            must see one. Where every sample ends in padding, t may be below s. None: queries at the last s positions.

    Returns:
        [s, b, n, d] in q's dtype.

    Raises:
        ValueError: fewer keys than queries without ``visible``, or heads that do not divide.
    """
    (s, _, n, _), (t, _, m, _) = q.shape, k.shape
    if (t < s and visible is None) or n % m or k.shape != v.shape:
        raise ValueError(
            "attention takes q[s, b, n, d] and k, v[t, b, m, d] with t >= s and n a multiple of m; got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    # No mask tensor where none is needed: torch's fastest kernels take none. One query at the last position sees all.
    if visible is not None:
        mask = visible.unsqueeze(1)
    else:
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril_(t - s) if 1 < s < t else None
    causal = s == t and visible is None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=m < n)
    return y.permute(2, 0, 1, 3)

"""Attention against the softmax written out."""

from __future__ import annotations

import math
from typing import Optional

import pytest
import torch
from torch import Tensor

from megatron_implicit.ops.attention import attention


def make(s: int, t: int, n: int = 4, m: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * s + t)
    shapes = (s, 2, n, 8), (t, 2, m, 8), (t, 2, m, 8)
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: Optional[float] = None) -> Tensor:
    (s, _, n, d), (t, _, m, _) = q.shape, k.shape
    k, v = k.repeat_interleave(n // m, dim=2), v.repeat_interleave(n // m, dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * (1 / math.sqrt(d) if scale is None else scale)
    for i in range(s):
        scores[:, :, i, t - s + i + 1 :] = -math.inf
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v)


@pytest.mark.parametrize("m", [4, 2, 1])
@pytest.mark.parametrize("s, t", [(7, 7), (1, 1), (1, 7), (3, 7), (6, 7)])
def test_output_and_gradients_match_the_softmax_written_out(s: int, t: int, m: int) -> None:
    q, k, v = make(s, t, m=m)
    got, want = attention(q, k, v), written_out(q, k, v)
    assert got.shape == q.shape
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for gradient, expected in zip(
        torch.autograd.grad(got.pow(3).sum(), (q, k, v)), torch.autograd.grad(want.pow(3).sum(), (q, k, v))
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_scale_replaces_the_default() -> None:
    q, k, v = make(5, 5)
    torch.testing.assert_close(attention(q, k, v, scale=0.7), written_out(q, k, v, scale=0.7))


def test_later_keys_do_not_reach_earlier_queries() -> None:
    q, k, v = (tensor.detach() for tensor in make(6, 6, dtype=torch.float32))
    before = attention(q, k, v)
    k, v = k.clone(), v.clone()
    k[4:], v[4:] = 100.0, 100.0
    torch.testing.assert_close(attention(q, k, v)[:4], before[:4], rtol=0, atol=0)


def test_queries_continued_from_a_cache_equal_the_whole() -> None:
    q, k, v = (tensor.detach() for tensor in make(9, 9))
    whole = attention(q, k, v)
    parts = [attention(q[a:b], k[:b], v[:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("s, t, m", [(7, 3, 4), (3, 7, 3)])
def test_what_does_not_fit_is_refused(s: int, t: int, m: int) -> None:
    q, k, v = make(s, t, m=m)
    with pytest.raises(ValueError, match="attention takes"):
        attention(q, k, v)

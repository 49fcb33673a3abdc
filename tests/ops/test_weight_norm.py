"""Weight norm against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

from megatron_implicit.ops.weight_norm import weight_norm


def make(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(*shape, generator=generator, dtype=dtype)
    g = torch.rand(shape[0], generator=generator, dtype=dtype) + 0.5
    return v.requires_grad_(), g.requires_grad_()


def gradients(weight: Tensor, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    upstream = torch.cos(torch.arange(weight.numel(), dtype=weight.dtype)).view_as(weight)
    return torch.autograd.grad(weight, sources, upstream)


@pytest.mark.parametrize("shape", [(6, 5), (6, 1, 4), (1, 7)])
def test_value_and_gradients_match_torch(shape: tuple[int, ...]) -> None:
    v, g = make(*shape)
    column = g.detach().view(-1, *[1] * (len(shape) - 1)).requires_grad_()
    expected = torch._weight_norm(v, column, 0)
    weight = weight_norm(v, g)
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=1e-13)
    for got, want in zip(gradients(weight, (v, g)), gradients(expected, (v, column))):
        torch.testing.assert_close(got, want.view_as(got), rtol=1e-12, atol=1e-12)


def test_matches_the_parametrization_of_a_linear_layer() -> None:
    layer = torch_weight_norm(torch.nn.Linear(7, 4, dtype=torch.float64), dim=0)
    stored = layer.parametrizations.weight
    weight = weight_norm(stored.original1, stored.original0.flatten())
    torch.testing.assert_close(weight, layer.weight)


def test_columns_over_two_ranks_equal_the_whole_row() -> None:
    """Each shard adds the other's ‖v‖², values and gradients: what the tensor group's sum does."""
    v, g = make(6, 10)
    left, right = v.split([4, 6], dim=1)
    squares = {"left": left.square().sum(1), "right": right.square().sum(1)}
    parts = [
        weight_norm(left, g, reduce=lambda own: own + squares["right"]),
        weight_norm(right, g, reduce=lambda own: own + squares["left"]),
    ]
    weight, expected = torch.cat(parts, dim=1), weight_norm(v, g)
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=1e-13)
    for got, want in zip(gradients(weight, (v, g)), gradients(expected, (v, g))):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_normed_in_float32_and_rounded_once() -> None:
    v, g = (tensor.detach() for tensor in make(4, 4096, dtype=torch.float32))
    v = v.bfloat16()
    weight = weight_norm(v, g)
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight, weight_norm(v.float(), g).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_row_that_only_pads_stays_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    v, g = (tensor.detach().clone() for tensor in make(3, 4, dtype=dtype))
    v[1], g[1] = 0.0, 0.0
    v.requires_grad_(), g.requires_grad_()
    weight = weight_norm(v, g)
    dv, dg = gradients(weight, (v, g))
    assert weight[1].eq(0).all() and dv[1].eq(0).all() and dg[1] == 0
    assert weight.isfinite().all() and dv.isfinite().all() and dg.isfinite().all()

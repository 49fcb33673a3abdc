"""Root-mean-square norms against their formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.device.kernels import find_kernels
from megatron_implicit.ops import norms
from megatron_implicit.ops.norms import gated_rms_norm, rms_norm

EPS = 1e-5


def make(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def gated_formula(y: Tensor, gate: Tensor, weight: Tensor, group_size: int) -> Tensor:
    groups = (y * gate * torch.sigmoid(gate)).split(group_size, dim=-1)
    return torch.cat([formula(g, w) for g, w in zip(groups, weight.split(group_size))], dim=-1)


def assert_same_with_gradients(got: Tensor, want: Tensor, sources: list[Tensor], tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    upstream = torch.cos(torch.arange(got.numel(), dtype=got.dtype)).view_as(got)
    gradients = torch.autograd.grad(got, sources, upstream)
    for gradient, expected in zip(gradients, torch.autograd.grad(want, sources, upstream)):
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["torch", "fused"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to norm; torch's fused one is composed of simple operations on a CPU."""
    kernels = replace(find_kernels("cpu"), norm=request.param)
    monkeypatch.setattr(norms, "find_kernels", lambda device_type: kernels)
    return request.param


def test_rms_norm_matches_its_formula(implementation: str) -> None:
    x, weight = make((5, 2, 12), (12,))
    assert_same_with_gradients(rms_norm(x, weight, EPS, out_dtype=torch.float64), formula(x, weight), [x, weight])


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_has_float32_statistics_and_rounds_once(
    implementation: str, x_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    x, weight = (tensor.detach() for tensor in make((4, 300), (300,), dtype=torch.float32))
    x = (100 * x).to(x_dtype)
    y = rms_norm(x, weight, EPS, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    torch.testing.assert_close(y, formula(x.float(), weight).to(out_dtype))


@pytest.mark.parametrize("group_size", [12, 4, 3])
def test_gated_norm_matches_its_formula_by_group(implementation: str, group_size: int) -> None:
    y, gate, weight = make((5, 2, 12), (5, 2, 12), (12,))
    got = gated_rms_norm(y, gate, weight, group_size=group_size, eps=EPS)
    assert_same_with_gradients(got, gated_formula(y, gate, weight, group_size), [y, gate, weight])


def test_gate_comes_before_the_norm() -> None:
    y, gate, weight = make((3, 8), (3, 8), (8,))
    after = formula(y, weight) * F.silu(gate)
    got = gated_rms_norm(y, gate, weight, group_size=8, eps=EPS)
    assert (got - after).abs().max() > 0.1


def test_group_over_two_ranks_equals_the_whole_group() -> None:
    """Two shards whose sums of squares are added, values and gradients: what the tensor group's sum does."""
    y, gate, weight = make((5, 12), (5, 12), (12,))
    shards = list(zip(y.split([4, 8], -1), gate.split([4, 8], -1), weight.split([4, 8])))
    squares = [(a * F.silu(b)).square().sum(-1, keepdim=True) for a, b, _ in shards]
    parts = [
        gated_rms_norm(a, b, w, group_size=12, eps=EPS, reduce=lambda own, other=other: own + other)
        for (a, b, w), other in zip(shards, reversed(squares))
    ]
    assert_same_with_gradients(torch.cat(parts, -1), gated_formula(y, gate, weight, 12), [y, gate, weight])


def test_gated_norm_of_bfloat16_is_float32() -> None:
    y, gate, weight = (tensor.detach() for tensor in make((4, 64), (4, 64), (64,), dtype=torch.float32))
    got = gated_rms_norm(y.bfloat16(), gate.bfloat16(), weight, group_size=64, eps=EPS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, gated_formula(y.bfloat16().float(), gate.bfloat16().float(), weight, 64))


@pytest.mark.parametrize("channels, group_size", [(12, 24), (12, 8)])
def test_channels_that_are_no_whole_groups_are_refused(channels: int, group_size: int) -> None:
    y, gate, weight = make((2, channels), (2, channels), (channels,))
    with pytest.raises(ValueError, match="group_size"):
        gated_rms_norm(y, gate, weight, group_size=group_size, eps=EPS)

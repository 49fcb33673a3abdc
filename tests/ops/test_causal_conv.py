"""The causal convolution against torch's conv1d, in every implementation."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.device.kernels import FORCE_VARIABLE, find_kernels
from megatron_implicit.ops import causal_conv
from megatron_implicit.ops.causal_conv import causal_conv1d


def make_inputs(s: int, c: int = 6, k: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x [2, s, c], weight, bias and a state, all requiring gradient."""
    generator = torch.Generator().manual_seed(s)
    shapes = (2, s, c), (c, k), (c,), (2, c, k - 1)
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def reference(x: Tensor, weight: Tensor, bias: Tensor, state: Optional[Tensor]) -> Tensor:
    taps = weight.shape[1]
    before = x.new_zeros(x.shape[0], x.shape[2], taps - 1) if state is None else state
    inputs = torch.cat([before, x.transpose(1, 2)], dim=2)
    return F.silu(F.conv1d(inputs, weight.unsqueeze(1), bias, groups=x.shape[2])).transpose(1, 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("s, k", [(1, 4), (2, 4), (11, 4), (11, 2), (5, 1)])
def test_output_and_every_gradient_match_conv1d(
    s: int, k: int, with_state: bool, dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, bias, state = make_inputs(s, k=k, dtype=dtype)
    sources = (x, weight, bias, state) if with_state and k > 1 else (x, weight, bias)
    state = state if with_state else None
    y, _ = causal_conv1d(x, weight, bias, state=state)
    expected = reference(x, weight, bias, state)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.cos(torch.arange(y.numel(), dtype=dtype)).view_as(y)
    for got, want in zip(torch.autograd.grad(y, sources, upstream), torch.autograd.grad(expected, sources, upstream)):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cut", [1, 2, 3, 8, 11])
def test_two_parts_that_pass_the_state_equal_the_whole(cut: int, dtype: torch.dtype) -> None:
    x, weight, bias, _ = make_inputs(12, dtype=dtype)
    whole, whole_state = causal_conv1d(x, weight, bias)
    head, state = causal_conv1d(x[:, :cut], weight, bias)
    tail, state = causal_conv1d(x[:, cut:], weight, bias, state=state)
    parts = torch.cat([head, tail], dim=1)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(state, whole_state)
    for got, want in zip(
        torch.autograd.grad(parts.square().sum(), (x, weight, bias)),
        torch.autograd.grad(whole.square().sum(), (x, weight, bias)),
    ):
        torch.testing.assert_close(got, want)


def test_state_holds_the_last_inputs_and_does_not_keep_the_rest_alive() -> None:
    x, weight, bias, state = (tensor.detach() for tensor in make_inputs(5))
    _, after = causal_conv1d(x, weight, bias)
    torch.testing.assert_close(after, x[:, -3:].transpose(1, 2), rtol=0, atol=0)
    assert after.untyped_storage().nbytes() == after.numel() * after.element_size()
    _, after = causal_conv1d(x[:, :2], weight, bias, state=state)
    torch.testing.assert_close(after[:, :, 0], state[:, :, 2], rtol=0, atol=0)
    torch.testing.assert_close(after[:, :, 1:], x[:, :2].transpose(1, 2), rtol=0, atol=0)


def test_onednn_and_shifted_sums_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_kernels("cpu").causal_conv != "onednn":
        pytest.skip("this torch was built without oneDNN")
    x, weight, bias, state = make_inputs(33, c=40, dtype=torch.float32)
    y, _ = causal_conv1d(x, weight, bias, state=state)
    gradients = torch.autograd.grad(y.square().sum(), (x, weight, bias, state))
    monkeypatch.setenv(FORCE_VARIABLE, "torch")
    assert find_kernels("cpu").causal_conv == "torch"
    forced, _ = causal_conv1d(x, weight, bias, state=state)
    torch.testing.assert_close(y, forced, rtol=2e-6, atol=2e-6)
    for got, want in zip(gradients, torch.autograd.grad(forced.square().sum(), (x, weight, bias, state))):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once() -> None:
    x, weight, bias, _ = (tensor.detach().bfloat16() for tensor in make_inputs(9, dtype=torch.float32))
    y, state = causal_conv1d(x, weight, bias)
    assert y.dtype == state.dtype == torch.bfloat16
    in_float32, _ = causal_conv1d(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(y, in_float32.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("broken", ["weight", "bias", "state"])
def test_what_does_not_fit_is_refused(broken: str) -> None:
    x, weight, bias, state = make_inputs(5)
    tensors = {"weight": weight, "bias": bias, "state": state}
    tensors[broken] = tensors[broken][..., 1:] if broken != "weight" else weight[1:]
    with pytest.raises(ValueError, match="causal_conv1d takes"):
        causal_conv1d(x, tensors["weight"], tensors["bias"], state=tensors["state"])


class TestCallOfTheCudaKernel:
    """The layout the CUDA kernel insists on: a stand-in checks it as causal_conv1d.cpp of version 1.6.2 does."""

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
        calls: list[tuple[int, ...]] = []

        def causal_conv1d_fn(
            x: Tensor, weight: Tensor, bias: Tensor, *, initial_states: Optional[Tensor], activation: str
        ):
            calls.append(tuple(x.shape))
            assert activation == "silu" and weight.is_contiguous() and bias.dtype == weight.dtype
            assert x.shape[1] % 8 == 0 and 2 <= weight.shape[1] <= 4
            assert x.stride(1) == 1 and x.stride(2) > 1, "channels last"
            assert x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, "aligned vectors"
            assert initial_states is None or (initial_states.stride(1) == 1 and initial_states.dtype == x.dtype)
            return reference(x.transpose(1, 2), weight, bias, initial_states).transpose(1, 2)

        package = types.ModuleType("causal_conv1d")
        package.causal_conv1d_fn = causal_conv1d_fn
        monkeypatch.setitem(sys.modules, "causal_conv1d", package)
        kernels = replace(find_kernels("cpu"), causal_conv="causal_conv1d")
        monkeypatch.setattr(causal_conv, "find_kernels", lambda device_type: kernels)
        return calls

    @pytest.mark.parametrize("width", [16, 24, 29])
    @pytest.mark.parametrize("layout", ["batch first", "sequence first", "one sample"])
    def test_slices_of_a_projection_reach_it_in_its_layout(self, calls: list, width: int, layout: str) -> None:
        x, weight, bias, state = make_inputs(9, c=16, dtype=torch.float32)
        batch = 1 if layout == "one sample" else 2
        first = (9, batch) if layout == "sequence first" else (batch, 9)
        wide = torch.randn(*first, width + 3)
        if layout == "sequence first":
            wide = wide.transpose(0, 1)
        part = wide[..., :16]
        y, after = causal_conv1d(part, weight, bias, state=state[:batch])
        assert calls == [(batch, 16, 9)]
        torch.testing.assert_close(y, reference(part, weight, bias, state[:batch]))
        torch.testing.assert_close(after, part[:, -3:].transpose(1, 2))

    @pytest.mark.parametrize("s, c, k, dtype", [
        (9, 12, 4, torch.float32), (9, 16, 5, torch.float32), (1, 16, 4, torch.float32), (9, 16, 4, torch.float64),
    ])  # fmt: skip
    def test_what_it_does_not_take_is_computed_in_torch(
        self, calls: list, s: int, c: int, k: int, dtype: torch.dtype
    ) -> None:
        x, weight, bias, _ = make_inputs(s, c=c, k=k, dtype=dtype)
        y, _ = causal_conv1d(x, weight, bias)
        assert calls == []
        torch.testing.assert_close(y, reference(x, weight, bias, None))

"""The chunked scan against the recurrence it stands for."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.ops import ssd
from megatron_implicit.ops.ssd import ssd_scan, ssd_scan_sequential

NAMES = ("y", "state", "x", "dt", "A", "B", "C", "D", "initial state")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    s: int, g: int = 1, *, b: int = 2, h: int = 4, p: int = 3, n: int = 5, dtype: torch.dtype = torch.float64
) -> Inputs:
    """x, dt, A, B, C, D and an initial state, all requiring gradient."""
    generator = torch.Generator().manual_seed(17 * s + g)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = (
        normal(b, s, h, p),
        F.softplus(normal(b, s, h) - 1),
        -4 * torch.rand(h, generator=generator, dtype=dtype),
        normal(b, s, g, n),
        normal(b, s, g, n),
        normal(h),
        normal(b, h, p, n),
    )
    return tuple(tensor.requires_grad_() for tensor in tensors)


def outputs_and_gradients(scan: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, **options: int) -> list[Tensor]:
    """y, the final state, and the gradient of a loss of both for every input."""
    y, state = scan(*inputs[:6], initial_state=inputs[6], **options)
    weights = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    loss = (weights * y).sum() + (state * state).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("s", [1, 2, 7, 24, 37])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
def test_outputs_and_every_gradient_match_the_sequential_scan(s: int, g: int, chunk_size: int) -> None:
    inputs = make_inputs(s, g)
    expected = outputs_and_gradients(ssd_scan_sequential, inputs)
    actual = outputs_and_gradients(ssd_scan, inputs, chunk_size=chunk_size)
    for name, want, got in zip(NAMES, expected, actual):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("s", [1, 9])
def test_skip_weight_and_initial_state_may_be_absent(s: int) -> None:
    x, dt, A, B, C, _, _ = make_inputs(s)
    y, state = ssd_scan(x, dt, A, B, C, None, chunk_size=4)
    expected_y, expected_state = ssd_scan_sequential(x, dt, A, B, C, None)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)
    sources = (x, dt, A, B, C)
    gradients = torch.autograd.grad(y.square().sum(), sources, materialize_grads=True)  # one token reads no decay
    for got, want in zip(gradients, torch.autograd.grad(expected_y.square().sum(), sources)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cut", [1, 2, 5, 16, 18, 19])
def test_two_parts_that_pass_the_state_equal_the_whole(cut: int) -> None:
    inputs = make_inputs(20, g=2)

    def in_two_parts(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, initial_state: Tensor):
        ys, state = [], initial_state
        for x_part, dt_part, B_part, C_part in zip(*(t.split([cut, 20 - cut], dim=1) for t in (x, dt, B, C))):
            y, state = ssd_scan(x_part, dt_part, A, B_part, C_part, D, chunk_size=4, initial_state=state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    whole = outputs_and_gradients(ssd_scan, inputs, chunk_size=4)
    for got, want in zip(outputs_and_gradients(in_two_parts, inputs), whole):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_tokens_one_by_one_equal_the_whole() -> None:
    x, dt, A, B, C, D, state = (tensor.detach() for tensor in make_inputs(6, g=2))
    expected_y, expected_state = ssd_scan(x, dt, A, B, C, D, chunk_size=4, initial_state=state)
    for i in range(6):
        now = slice(i, i + 1)
        y, state = ssd_scan(x[:, now], dt[:, now], A, B[:, now], C[:, now], D, chunk_size=4, initial_state=state)
        torch.testing.assert_close(y, expected_y[:, now])
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 30.0, 1e4])
def test_extreme_steps_stay_finite_and_accurate(scale: float) -> None:
    """From no decay at all, through powers that underflow, to states forgotten at once.

    The tolerance is the rounding of a float32 sum of large exponents.
    """
    x, dt, A, B, C, D, state = (tensor.detach() for tensor in make_inputs(40, dtype=torch.float32))
    dt = scale * dt
    dt[:, 3] = 0.0
    inputs = tuple(tensor.requires_grad_() for tensor in (x, dt, 4 * A, B, C, D, state))
    actual = outputs_and_gradients(ssd_scan, inputs, chunk_size=16)
    expected = outputs_and_gradients(ssd_scan_sequential, tuple(t.detach().double().requires_grad_() for t in inputs))
    for name, got, want in zip(NAMES, actual, expected):
        assert got.isfinite().all(), name
        assert (got.double() - want).norm() <= 1e-3 * want.norm(), name


def test_float32_keeps_its_precision_over_a_long_sequence() -> None:
    inputs = tuple(t.detach() for t in make_inputs(128, h=8, p=32, n=32, dtype=torch.float32))
    actual = outputs_and_gradients(ssd_scan, tuple(t.requires_grad_() for t in inputs), chunk_size=32)
    expected = outputs_and_gradients(ssd_scan_sequential, tuple(t.detach().double().requires_grad_() for t in inputs))
    for name, got, want in zip(NAMES, actual, expected):
        assert (got.double() - want).norm() <= 2e-6 * want.norm(), name


def test_bfloat16_inputs_give_bfloat16_outputs_and_gradients_computed_in_float32() -> None:
    inputs = tuple(t.detach().bfloat16().requires_grad_() for t in make_inputs(19, dtype=torch.float32))
    same_values = tuple(t.detach().float().requires_grad_() for t in inputs)
    actual = outputs_and_gradients(ssd_scan, inputs, chunk_size=8)
    assert actual[1].dtype == torch.float32
    for tensor in (actual[0], *actual[2:]):
        assert tensor.dtype == torch.bfloat16
    y, state = ssd_scan(*same_values[:6], chunk_size=8, initial_state=same_values[6])
    torch.testing.assert_close(actual[0], y.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(actual[1], state, rtol=0, atol=0)


def test_backward_pass_saves_the_inputs_only() -> None:
    x, dt, A, B, C, D, state = make_inputs(32, dtype=torch.float32)
    inputs = {tensor.data_ptr() for tensor in (x, dt, A, B, C, D, state)}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ssd_scan(x, dt, A, B, C, D, chunk_size=8, initial_state=state)
    assert set(saved) == inputs


def test_second_derivative_is_refused() -> None:
    x, dt, A, B, C, D, state = make_inputs(8)
    y, _ = ssd_scan(x, dt, A, B, C, D, chunk_size=4, initial_state=state)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_directional_derivatives_match_the_sequential_scan() -> None:
    """Forward mode, which the torch version supports where no input requires gradient."""
    inputs = tuple(tensor.detach() for tensor in make_inputs(19, g=2))
    directions = tuple(tensor.flip(0) for tensor in inputs)

    def chunked(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan(*tensors[:6], chunk_size=4, initial_state=tensors[6])

    def sequential(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan_sequential(*tensors[:6], initial_state=tensors[6])

    got, want = (torch.func.jvp(scan, inputs, directions) for scan in (chunked, sequential))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_views_of_a_wider_tensor_are_taken_as_they_are() -> None:
    """x, B and C arrive as slices of the convolution's output."""
    x, dt, A, B, C, D, state = (tensor.detach() for tensor in make_inputs(12, g=2))
    wide = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], dim=-1)
    x_view, B_view, C_view = wide.split([12, 10, 10], dim=-1)
    views = x_view.unflatten(-1, (4, 3)), dt, A, B_view.unflatten(-1, (2, 5)), C_view.unflatten(-1, (2, 5)), D
    got = ssd_scan(*views, chunk_size=4, initial_state=state)
    want = ssd_scan(x, dt, A, B, C, D, chunk_size=4, initial_state=state)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("broken", ["dt", "A", "groups", "chunk"])
def test_what_does_not_fit_is_refused(broken: str) -> None:
    x, dt, A, B, C, D, _ = make_inputs(6)
    B = B.expand(-1, -1, 3, -1) if broken == "groups" else B
    with pytest.raises(ValueError, match="ssd_scan"):
        ssd_scan(
            x,
            dt[:, 1:] if broken == "dt" else dt,
            A[1:] if broken == "A" else A,
            B,
            C.expand_as(B),
            D,
            chunk_size=0 if broken == "chunk" else 4,
        )


def test_longer_chunks_than_the_fastest_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' 256 in a configuration does not make the torch version slow."""
    lengths: list[int] = []
    decays = ssd._decays
    monkeypatch.setattr(ssd, "_decays", lambda chunks: lengths.append(chunks.x.shape[2]) or decays(chunks))
    x, dt, A, B, C, D, _ = (tensor.detach() for tensor in make_inputs(300))
    ssd_scan(x, dt, A, B, C, D, chunk_size=256)
    assert lengths and max(lengths) <= 32

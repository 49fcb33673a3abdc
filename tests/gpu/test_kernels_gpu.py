"""The operations on a GPU, compiled kernels included, against the torch versions on the CPU in float64.

float32 products on a GPU may run in TF32 (10 bits of mantissa), inside Triton too: its tolerance is that of TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.device.kernels import FORCE_VARIABLE, describe, find_kernels
from megatron_implicit.ops import attention, causal_conv1d, gated_rms_norm, rms_norm, ssd_scan, weight_norm
from megatron_implicit.ops.ssd import ssd_scan_sequential

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


@pytest.fixture(params=["kernels", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this machine's kernels compute, and the torch versions on the same device."""
    if request.param == "torch":
        monkeypatch.setenv(FORCE_VARIABLE, "torch")
    return request.param


def require(operation: str, kernel: str, implementation: str) -> None:
    found = find_kernels("cuda")
    if implementation == "kernels" and getattr(found, operation) != kernel:
        pytest.skip(f"{operation}: {found.reasons[operation]}")


def assert_close_with_gradients(
    function: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Optional[Tensor]],
    tolerance: float,
) -> None:
    """Relative L2 error of every output and gradient; the CPU computes in float64 from the same rounded inputs."""
    on_gpu = [None if t is None else t.cuda().requires_grad_() for t in tensors]
    on_cpu = [None if t is None else t.double().requires_grad_() for t in tensors]
    results = []
    for call, sources in ((function, on_gpu), (reference, on_cpu)):
        outputs = call(*sources)
        loss = sum(
            (output.double() * torch.sin(torch.arange(output.numel(), device=output.device)).view_as(output)).sum()
            for output in outputs
        )
        used = [source for source in sources if source is not None]
        results.append([*outputs, *torch.autograd.grad(loss, used)])
    for number, (got, want) in enumerate(zip(*results)):
        got = got.detach().cpu().double()
        assert got.isfinite().all(), f"result {number}"
        assert (got - want).norm() <= tolerance * want.norm(), f"result {number}"


def scan_inputs(s: int, g: int, dtype: torch.dtype, *, full: bool) -> list[Optional[Tensor]]:
    """x, dt, A, B, C, D and a state as the mixer passes them: what it projects in ``dtype``, the rest float32."""
    b, h, p, n = 2, 8, 64, 32
    x, B, C = (normal(*shape).to(dtype) for shape in ((b, s, h, p), (b, s, g, n), (b, s, g, n)))
    dt, A = F.softplus(normal(b, s, h) - 3), -8 * torch.rand(h)
    return [x, dt, A, B, C, normal(h) if full else None, normal(b, h, p, n) if full else None]


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return ssd_scan(x, dt, A, B, C, D, chunk_size=64, initial_state=state)


def scan_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple:
    return ssd_scan_sequential(x, dt, A, B, C, D, initial_state=state)


def test_choices_are_described() -> None:
    print(describe("cuda"))
    assert find_kernels("cuda").norm == "fused"


@DTYPES
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("s, g", [(1, 1), (64, 1), (150, 2), (65, 8)])
def test_scan(implementation: str, s: int, g: int, full: bool, dtype: torch.dtype) -> None:
    require("ssd", "mamba_ssm", implementation)
    if s == 1 and not full:
        pytest.skip("one token without a state reads no decay: A has no gradient")
    tensors = scan_inputs(s, g, dtype, full=full)
    assert_close_with_gradients(scan, scan_reference, tensors, TOLERANCE[dtype])


@DTYPES
def test_scan_in_two_parts_equals_the_whole(implementation: str, dtype: torch.dtype) -> None:
    require("ssd", "mamba_ssm", implementation)

    def in_two_parts(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple:
        head, tail = zip(*(tensor.split([70, 80], dim=1) for tensor in (x, dt, B, C)))
        ys = []
        for x_part, dt_part, B_part, C_part in (head, tail):
            y, state = ssd_scan(x_part, dt_part, A, B_part, C_part, D, chunk_size=64, initial_state=state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    tensors = scan_inputs(150, 1, dtype, full=True)
    assert_close_with_gradients(in_two_parts, scan_reference, tensors, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("c", [64, 36])
@pytest.mark.parametrize("s, with_state", [(1, True), (2, True), (100, True), (100, False)])
def test_causal_convolution(implementation: str, s: int, with_state: bool, c: int, dtype: torch.dtype) -> None:
    require("causal_conv", "causal_conv1d", implementation)
    tensors = [normal(2, s, c).to(dtype), normal(c, 4).to(dtype), normal(c).to(dtype)]
    tensors.append(normal(2, c, 3).to(dtype) if with_state else None)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x, weight, bias, state=state)

    assert_close_with_gradients(convolve, convolve, tensors, TOLERANCE[dtype])


@DTYPES
def test_causal_convolution_of_a_misaligned_slice(implementation: str, dtype: torch.dtype) -> None:
    """The [s, b, ...] projection seen as [b, s, ...], cut at a channel that is no multiple of 8."""
    require("causal_conv", "causal_conv1d", implementation)

    def convolve(wide: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(wide.transpose(0, 1)[..., 5:69], weight, bias)

    tensors = [normal(50, 2, 75).to(dtype), normal(64, 4).to(dtype), normal(64).to(dtype)]
    assert_close_with_gradients(convolve, convolve, tensors, TOLERANCE[dtype])


@DTYPES
def test_norms(implementation: str, dtype: torch.dtype) -> None:
    x, gate, weight = normal(33, 2, 96).to(dtype), normal(33, 2, 96).to(dtype), normal(96)

    def both(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return (
            rms_norm(x, weight, 1e-5, out_dtype=x.dtype),
            gated_rms_norm(x, gate, weight, group_size=32, eps=1e-5),
        )

    assert_close_with_gradients(both, both, [x, gate, weight], TOLERANCE[dtype])


@DTYPES
def test_weight_norm(dtype: torch.dtype) -> None:
    def normed(v: Tensor, g: Tensor) -> tuple[Tensor]:
        return (weight_norm(v, g),)

    assert_close_with_gradients(normed, normed, [normal(40, 300).to(dtype), torch.rand(40) + 0.5], TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("s, t, m", [(128, 128, 4), (128, 128, 2), (1, 50, 4), (20, 50, 2)])
def test_attention(s: int, t: int, m: int, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (attention(q, k, v),)

    tensors = [normal(s, 2, 4, 64).to(dtype), normal(t, 2, m, 64).to(dtype), normal(t, 2, m, 64).to(dtype)]
    assert_close_with_gradients(attend, attend, tensors, TOLERANCE[dtype])

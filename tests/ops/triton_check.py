"""Runs mamba_ssm's Triton kernels on the CPU, through Triton's interpreter, beside the torch scan.

Run by ``test_triton_kernels.py`` in a process of its own, with TRITON_INTERPRET=1 in its environment: the interpreter
is switched on for a whole process, and parts of torch.cuda are replaced. Prints a JSON object: for each case the
relative L2 difference of each output and gradient.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
import types
from dataclasses import replace
from typing import Any, Callable, Optional
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

# Length, groups, whether with D and an initial state, dtype of x, B and C. The interpreter cannot multiply bfloat16.
CASES = (
    (32, 1, True, torch.float32),
    (37, 2, True, torch.float32),
    (20, 1, False, torch.float32),
    (32, 1, True, torch.float16),
)
NAMES = ("y", "state", "x", "dt", "A", "B", "C", "D", "initial_state")


def pretend_a_device() -> None:
    """The kernels' callers ask for the device's index and number of processors; the interpreter needs neither."""
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=1)


def leave_one_configuration() -> None:
    """Tuning needs a driver; a single configuration is not timed. The largest blocks need the fewest programs."""
    autotune = triton.autotune

    def largest(config: Any) -> int:
        size = 1
        for block in config.kwargs.values():
            size *= block
        return size

    def untuned(configs: list[Any], **options: Any) -> Callable:
        return autotune([max(configs, key=largest)], **options)

    triton.autotune = untuned


def skip_package_init() -> None:
    """mamba_ssm's own __init__ imports its models, and with them a compiled module and transformers."""
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(importlib.util.find_spec("mamba_ssm").submodule_search_locations)
    sys.modules["mamba_ssm"] = package


def outputs_and_gradients(scan: Callable, tensors: list[Optional[Tensor]], chunk_size: int) -> dict[str, Tensor]:
    sources = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    y, state = scan(*sources[:6], chunk_size=chunk_size, initial_state=sources[6])
    weights = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    ((weights * y).sum() + 0.1 * (state * state).sum()).backward()
    results = [y.detach(), state.detach(), *(None if source is None else source.grad for source in sources)]
    return {name: result for name, result in zip(NAMES, results) if result is not None}


def inputs(s: int, g: int, full: bool, dtype: torch.dtype) -> list[Optional[Tensor]]:
    """x, dt, A, B, C and, if full, D and an initial state; what the projection makes has ``dtype``."""
    b, h, p, n = 2, 4, 16, 16
    generator = torch.Generator().manual_seed(s + g)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rates = -4 * torch.rand(h, generator=generator)
    x, B, C = (normal(*shape).to(dtype) for shape in ((b, s, h, p), (b, s, g, n), (b, s, g, n)))
    skip_and_state = [normal(h), normal(b, h, p, n)] if full else [None, None]
    return [x, F.softplus(normal(b, s, h) - 1), rates, B, C, *skip_and_state]


def gated_norm(norm: Callable) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, gate = (torch.randn(3, 7, 32, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.randn(32, generator=generator).requires_grad_()
    normed = norm(y, gate, weight)
    (normed * torch.sin(torch.arange(normed.numel())).view_as(normed)).sum().backward()
    return {"normed": normed.detach(), "y": y.grad, "gate": gate.grad, "weight": weight.grad}


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name] - want[name]).float().norm() / want[name].float().norm()) for name in want}


def main() -> None:
    pretend_a_device()
    leave_one_configuration()
    skip_package_init()
    from mamba_ssm.ops.triton import ssd_combined
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    from megatron_implicit.device.kernels import find_kernels
    from megatron_implicit.ops import norms, ssd

    kernels = replace(find_kernels("cpu"), ssd="mamba_ssm")
    report: dict[str, Any] = {}
    for s, g, full, dtype in CASES:
        tensors = inputs(s, g, full, dtype)
        want = outputs_and_gradients(ssd.ssd_scan, tensors, 16)
        with (
            mock.patch.object(ssd, "find_kernels", lambda device_type: kernels),
            mock.patch.object(
                ssd_combined, "mamba_chunk_scan_combined", wraps=ssd_combined.mamba_chunk_scan_combined
            ) as kernel,
        ):
            got = outputs_and_gradients(ssd.ssd_scan, tensors, 16)
        assert kernel.call_count == 1, "the dispatch did not reach the Triton kernels"
        report[f"scan, s={s} g={g} {'full' if full else 'bare'} {dtype}"] = differences(got, want)
    for group_size in (32, 8):
        options = {"eps": 1e-5, "group_size": group_size}
        want = gated_norm(functools.partial(norms.gated_rms_norm, **options))
        got = gated_norm(lambda y, gate, weight: rmsnorm_fn(y, weight, None, z=gate, norm_before_gate=False, **options))
        report[f"gated norm, group_size={group_size}"] = differences(got, want)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

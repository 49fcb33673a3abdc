"""Lets Megatron-Core run on a CPU with Gloo. Never installed where torch sees a GPU.

Megatron-Core calls ``torch.cuda`` without asking whether there is one. Each function below stands for one reason and
patches the symbols it names, nothing else; measured with Megatron-Core 0.16.1 and 0.19.2 on torch 2.13.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

import torch
import torch.autograd.forward_ad
import torch.utils._device

_CPU = torch.device("cpu")


def install_cpu_shim() -> None:
    """Patches torch.cuda's entry points and Megatron-Core's RNG tracker for a machine without a GPU."""
    _stub_device_queries()
    _stub_streams_and_events()
    _route_rng_to_cpu()
    _send_cuda_factories_to_cpu()
    _keep_tensors_on_cpu()
    _skip_compiled_fusions()
    _fork_cpu_generator()


def _stub_device_queries() -> None:
    """torch.cuda.{current_device, set_device, synchronize, empty_cache}: called unconditionally."""
    torch.cuda.current_device = lambda: _CPU
    # One object a name: torch._dynamo's rule table refuses one function registered under two names.
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, _do_nothing(name))


def _do_nothing(name: str) -> Callable[..., None]:
    def stub(*args: Any, **kwargs: Any) -> None:
        return None

    stub.__name__ = name
    return stub


class _Stream:
    """torch.cuda.Stream: one CPU "stream", always in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> "_Event":
        return _Event()


class _Event:
    """torch.cuda.Event: always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _stub_streams_and_events() -> None:
    """torch.cuda.{Stream, Event, stream, current_stream, default_stream}: used by DDP and the schedules."""
    stream = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_stream = lambda *args, **kwargs: stream
    torch.cuda.default_stream = lambda *args, **kwargs: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _route_rng_to_cpu() -> None:
    """torch.cuda.{get_rng_state, set_rng_state, manual_seed}: the CPU generator is the device's generator."""
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or (type(device) is int)


def _send_cuda_factories_to_cpu() -> None:
    """torch.{tensor, zeros, ...}(device='cuda'): literals in the optimizer, the loss scaling and the schedules."""
    # ``with torch.device(...)`` remembers the factories at its first use: it must remember the original ones.
    torch.utils._device._device_constructors()
    # Forward-mode differentiation compiles torch's decompositions at its first use: it must meet the original ones too.
    torch.autograd.forward_ad._maybe_load_decompositions()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "empty_like", "zeros_like"):
        factory = getattr(torch, name)

        @functools.wraps(factory)
        def on_cpu(*args: Any, _factory: Callable[..., Any] = factory, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs and _names_cuda(kwargs["device"]):
                kwargs["device"] = "cpu"
            return _factory(*args, **kwargs)

        setattr(torch, name, on_cpu)


_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _keep_tensors_on_cpu() -> None:
    """Tensor.cuda() stays put; Tensor.type() answers with CUDA's names, which the optimizers compare against."""
    plain_type = torch.Tensor.type

    def named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return _CUDA_TYPE_NAMES.get(self.dtype) or plain_type(self)
        return plain_type(self, *args, **kwargs)

    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = named_type


def _skip_compiled_fusions() -> None:
    """``jit_fuser`` binds torch.compile at import: compiling tiny element-wise functions costs minutes on a CPU."""
    compile_function = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda function: function)
    try:
        import megatron.core  # noqa: F401  (binds the fusions while torch.compile is the identity)
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = compile_function


def _fork_cpu_generator() -> None:
    """The model-parallel RNG tracker reads and sets CUDA generator states by device index: use the CPU generator."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise RuntimeError(f"RNG state {name} was not added: call model_parallel_cuda_manual_seed first")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork

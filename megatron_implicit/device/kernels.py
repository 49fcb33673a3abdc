"""Which compiled kernels this machine offers, and why each was or was not chosen.

The one place that decides: ``ops`` asks it with the type of the tensor's device, the start-up banner prints it.
Setting the environment variable ``MEGATRON_IMPLICIT_KERNELS=torch`` makes ``ops`` use its torch versions
everywhere, to tell a fault of a kernel from a fault of the model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

FORCE_VARIABLE = "MEGATRON_IMPLICIT_KERNELS"

WRONG_APEX = (
    "the installed 'apex' is not NVIDIA's (PyPI's package of that name is an unrelated Pyramid toolkit): "
    "pip uninstall apex, and on a GPU machine build NVIDIA's from its repository"
)


@dataclass(frozen=True)
class Kernels:
    """The implementation chosen for each operation that has more than one."""

    ssd: str
    """State space scan: 'mamba_ssm' (Triton) or 'torch'."""
    causal_conv: str
    """Causal convolution: 'causal_conv1d' (CUDA), 'onednn' (torch's own, on a CPU) or 'torch'."""
    norm: str
    """Root-mean-square norm: 'fused' (torch.nn.functional.rms_norm, one kernel on CUDA) or 'torch'."""
    optimizer: str
    """Adam: 'transformer_engine', 'apex' or 'torch'. Megatron-Core decides this itself, at import and in this order;
    the field reports what it will have found."""
    reasons: Mapping[str, str] = field(compare=False)
    """Why, by the name of the field."""


def find_kernels(device_type: str) -> Kernels:
    """The kernels for tensors on this type of device ('cpu', 'cuda', ...); cheap after the first call.

    Raises ValueError where ``MEGATRON_IMPLICIT_KERNELS`` is set to anything but 'torch'.
    """
    return _find(device_type, os.environ.get(FORCE_VARIABLE, ""))


def describe(device_type: str) -> str:
    """One line for each operation with the choice and its reason, to print when a run starts."""
    kernels = find_kernels(device_type)
    lines = (f"{name}: {getattr(kernels, name)} ({reason})" for name, reason in kernels.reasons.items())
    return "\n".join(f"kernel of {line}" for line in lines)


@functools.lru_cache(maxsize=None)
def _find(device_type: str, forced: str) -> Kernels:
    if forced not in ("", "torch"):
        raise ValueError(f"{FORCE_VARIABLE}={forced!r}: set it to 'torch' to use the torch versions, or unset it")
    choices = {
        "ssd": _accelerated("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", device_type, forced),
        "causal_conv": _find_causal_conv(device_type, forced),
        "norm": _find_norm(device_type, forced),
        "optimizer": _find_optimizer(),
    }
    reasons = MappingProxyType({name: reason for name, (_, reason) in choices.items()})
    return Kernels(**{name: choice for name, (choice, _) in choices.items()}, reasons=reasons)


def _accelerated(package: str, module: str, device_type: str, forced: str) -> tuple[str, str]:
    """The package or 'torch', and the reason."""
    if forced:
        return "torch", f"{FORCE_VARIABLE}={forced}"
    if device_type != "cuda":
        return "torch", f"{package} needs a CUDA device, tensors are on {device_type}"
    failure = _import_failure(module)
    return (package, f"{module} found") if failure is None else ("torch", failure)


def _find_causal_conv(device_type: str, forced: str) -> tuple[str, str]:
    if not forced and device_type == "cpu" and torch.backends.mkldnn.is_available():
        return "onednn", "this torch was built with oneDNN"
    return _accelerated("causal_conv1d", "causal_conv1d", device_type, forced)


def _find_norm(device_type: str, forced: str) -> tuple[str, str]:
    if forced:
        return "torch", f"{FORCE_VARIABLE}={forced}"
    if device_type != "cuda":
        return "torch", f"torch has no fused norm on {device_type}, and its composed one has a slower backward pass"
    return "fused", "torch's own"


def _find_optimizer() -> tuple[str, str]:
    transformer_engine = _import_failure("transformer_engine.pytorch.optimizers")
    if transformer_engine is None:
        return "transformer_engine", "FusedAdam found"
    apex = _apex_failure()
    if apex is None:
        return "apex", f"FusedAdam found; {transformer_engine}"
    return "torch", f"{transformer_engine}; {apex}"


def _apex_failure() -> str | None:
    """Why NVIDIA's Apex cannot be used; None if it can.

    Looks before it imports: importing the unrelated package of that name starts a web framework.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "apex not found"
    if not any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return WRONG_APEX
    if importlib.util.find_spec("amp_C") is None:
        return "apex was built without its CUDA extensions (amp_C): rebuild it with --cpp_ext --cuda_ext"
    return _import_failure("apex.optimizers")


def _import_failure(module: str) -> str | None:
    """Why the module cannot be imported; None if it was.

    A package whose compiled part does not fit this torch fails in many ways (ImportError, OSError from the loader,
    RuntimeError from a driver query); none of them may end a run that can do without it.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} not found"
    try:
        # The package first: once its import has failed, modules below it may still import, and the answer would
        # depend on whether someone tried before.
        importlib.import_module(package)
        importlib.import_module(module)
    except Exception as error:
        return f"{module} failed to import: {type(error).__name__}: {error}".splitlines()[0]
    return None

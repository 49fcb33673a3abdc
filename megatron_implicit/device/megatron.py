"""Prepares Megatron-Core for this machine, and holds every difference between its versions.

``prepare_megatron()`` runs before the first import of ``megatron.core``: it checks the version, installs the CPU shim
where there is no GPU (``cpu_shim``) and the repairs that torch's own AdamW needs anywhere (``torch_adam``). Every
other module imports Megatron-Core as it is; where 0.16 (Python 3.11) and 0.19 (Python 3.12) differ, it asks here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import warnings
from typing import Any, Callable

import torch

from megatron_implicit.errors import LaunchError

OLDEST, NEWEST = (0, 16), (0, 19)


@functools.lru_cache(maxsize=1)
def prepare_megatron() -> None:
    """Makes ``import megatron.core`` usable on this machine; later calls do nothing.

    Raises:
        LaunchError: Megatron-Core is missing or of an untested version.
    """
    _check_version()
    _quiet_imports()
    if not torch.cuda.is_available():
        from megatron_implicit.device.cpu_shim import install_cpu_shim

        install_cpu_shim()
    from megatron_implicit.device.torch_adam import repair_distributed_optimizer

    repair_distributed_optimizer()


def megatron_version() -> tuple[int, int]:
    """(major, minor) of the installed Megatron-Core.

    Raises:
        LaunchError: it is not installed.
    """
    try:
        text = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise LaunchError("megatron-core is not installed: run bash launch/setup.sh") from None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _check_version() -> None:
    version = megatron_version()
    if not OLDEST <= version <= NEWEST:
        raise LaunchError(
            f"megatron-core {version[0]}.{version[1]} is not supported: install one from "
            f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} (bash launch/setup.sh)"
        )


def _quiet_imports() -> None:
    """Megatron-Core warns at import about every optional package that is absent; kernels.describe() says it once."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        for module in (r"megatron\.core", r"torch\.distributed", r"torch\.jit"):
            warnings.filterwarnings("ignore", category=category, module=module)
    for name in ("megatron.core", "torch.utils.cpp_extension"):  # the latter: a CUDA toolkit without a GPU
        logging.getLogger(name).setLevel(logging.ERROR)


def mamba_stack_module() -> Any:
    """The module that defines MambaStack's layers: ``mamba_block`` up to 0.17, ``hybrid_block`` since 0.18."""
    try:
        return importlib.import_module("megatron.core.ssm.mamba_block")
    except ImportError:
        return importlib.import_module("megatron.core.models.hybrid.hybrid_block")


def accepted_arguments(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that this version's ``function`` takes: newer keywords are dropped on older versions."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def collect_checkpoint_writes_in_process() -> None:
    """Makes dist_checkpointing hand write results over by a plain queue instead of a Manager's.

    A synchronous save puts and gets them in one process. Upstream starts a Manager all the same: a process that costs
    seconds to start, since it imports the main program again, and that outlives a rank that is killed.
    """
    import queue

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()

"""The machine: CUDA (ROCm builds of torch included) or CPU, and what Megatron-Core needs to run on it.

``platform`` answers "which device, which collectives"; ``peaks`` what accelerators can do by their data sheets;
``kernels`` which compiled kernels are used and why; ``megatron`` prepares Megatron-Core (the CPU shim, and repairs that
are needed anywhere) and holds every difference between its versions. Nothing outside this folder asks whether there is
a GPU. Imports nothing of the package but ``errors``.

    from megatron_implicit.device import prepare_megatron
    prepare_megatron()          # before the first ``import megatron.core``
"""

from megatron_implicit.device.megatron import megatron_version, prepare_megatron
from megatron_implicit.device.platform import Platform, current_platform

__all__ = ["Platform", "current_platform", "megatron_version", "prepare_megatron"]

"""The machines a plan is for, and what of their data sheets a training run is assumed to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_implicit.device.peaks import DEVICE_PEAKS, device_peak
from megatron_implicit.errors import ConfigError


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet tells. Measure one layout on the cluster and set them to what it gave."""

    compute_efficiency: float = 0.5
    """Share of the peak that matrix products reach."""
    memory_efficiency: float = 0.7
    """Share of the memory bandwidth that element-wise work reaches."""
    link_efficiency: float = 0.7
    """Share of a link's bandwidth that collectives and messages reach."""
    layer_overhead: float = 0.0
    """Seconds of a layer's forward pass on top of products and traffic, where a device waits for the host to launch
    its many small kernels."""
    reserved_memory: float = 0.1
    """Share of the device memory left to the allocator's gaps, the collectives' buffers and the device's context."""
    decision: float = 30e-6
    """Seconds until the host has read a residual and the next task starts; only where the tolerance is above 0."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices."""

    nodes: int
    devices: int
    """Of one node."""
    device: str
    """Name of the device."""
    peak: float
    """FLOP/s in the run's precision."""
    memory_bytes: float
    """Of one device."""
    memory_bandwidth: float
    """Bytes/s of one device."""
    inside: float
    """Bytes/s that a device can send to the others of its node."""
    between: float
    """Bytes/s that a device can send to other nodes."""
    latency_inside: float = 2e-6
    """Seconds of a hop inside a node."""
    latency_between: float = 5e-6
    """Seconds of a hop between nodes."""
    assumed: Assumptions = Assumptions()

    def __post_init__(self) -> None:
        for name in ("nodes", "devices", "peak", "memory_bytes", "memory_bandwidth", "inside", "between"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{_FLAGS.get(name, '--' + name)}: {getattr(self, name):g} must be positive")

    @property
    def world(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices

    @classmethod
    def of_device(cls, name: str, precision: str, *, assumed: Assumptions = Assumptions(), **given: Optional[float]):
        """A cluster of a device of the table; ``given`` values other than None replace the table's.

        Raises:
            ConfigError: neither the table nor ``given`` has a value, by the flag that sets it.
        """
        known = device_peak(name)
        sheet = {
            "peak": known and known.flops(precision),
            "memory_bytes": known and known.memory_bytes,
            "memory_bandwidth": known and known.memory_bandwidth,
            "inside": known and known.link_bandwidth,
        }
        values = sheet | {key: value for key, value in given.items() if value is not None}
        for key in sheet:
            if values[key] is None:
                names = ", ".join(peak.name for peak in DEVICE_PEAKS)
                raise ConfigError(f"--device {name} has no known {key}: set {_FLAGS[key]}, or use one of {names}")
        return cls(device=known.name if known else name, assumed=assumed, **values)


_FLAGS = {
    "nodes": "--nodes",
    "devices": "--gpus-per-node",
    "peak": "--peak-tflops",
    "memory_bytes": "--memory-gb",
    "memory_bandwidth": "--memory-bandwidth-gbs",
    "inside": "--intra-node-gbs",
    "between": "--inter-node-gbs",
}
"""The command's flag for each value."""

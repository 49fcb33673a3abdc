"""What accelerators can do at best, from their makers' data sheets: the one table behind MFU and the planner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DevicePeak:
    """Data-sheet values of one device; None where the sheet says nothing."""

    name: str
    """A part of the name that torch gives the device."""
    bf16: float | None
    """FLOP/s of dense bfloat16 matrix products."""
    fp32: float | None
    """FLOP/s in float32, without TF32."""
    memory_bytes: float | None
    """Bytes of device memory; None where torch's name does not tell which size it is."""
    memory_bandwidth: float | None
    """Bytes/s of it."""
    link_bandwidth: float | None
    """Bytes/s that the device can send to the other devices of its node, all links together."""

    def flops(self, precision: str) -> float | None:
        """FLOP/s in 'bf16' or 'fp32'."""
        return getattr(self, precision)


# The first entry whose name is part of the device's name counts: longer names stand before the names they contain.
# Links: the sheets give both directions together, these are one: NVLink 900 GB/s (Hopper), 600 (A100), 300 (V100),
# Infinity Fabric 7 x 128 GB/s.
DEVICE_PEAKS: tuple[DevicePeak, ...] = (
    # name, bf16, fp32, memory, memory bandwidth, links
    # "NVIDIA GH200 Grace Hopper Superchip Data Sheet": 96 GB (HBM3) or 144 GB (HBM3e).
    DevicePeak("GH200", 990e12, 67e12, None, None, 450e9),
    # "NVIDIA H200 Tensor Core GPU Datasheet"; the tensor figures are printed with sparsity, half of them is dense.
    DevicePeak("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9),
    # "NVIDIA H100 Tensor Core GPU Datasheet": PCIe, NVL and SXM.
    DevicePeak("H100 PCIe", 756e12, 51e12, 80e9, 2.0e12, None),
    DevicePeak("H100 NVL", 835e12, 60e12, 94e9, 3.9e12, None),
    DevicePeak("H100", 989e12, 67e12, 80e9, 3.35e12, 450e9),
    # "NVIDIA A100 Tensor Core GPU Datasheet": 40 GB and 80 GB, PCIe and SXM; the same arithmetic.
    DevicePeak("A100-SXM4-80GB", 312e12, 19.5e12, 80e9, 2.039e12, 300e9),
    DevicePeak("A100 80GB PCIe", 312e12, 19.5e12, 80e9, 1.935e12, None),
    DevicePeak("A100", 312e12, 19.5e12, 40e9, 1.555e12, None),
    # "NVIDIA V100 Tensor Core GPU Datasheet" (SXM2): no bfloat16; 16 GB or 32 GB.
    DevicePeak("V100", None, 15.7e12, None, 0.9e12, 150e9),
    # "AMD Instinct MI325X Accelerator Data Sheet".
    DevicePeak("MI325X", 1307e12, 163.4e12, 256e9, 6.0e12, 448e9),
    # "AMD Instinct MI300X Accelerator Data Sheet".
    DevicePeak("MI300X", 1307e12, 163.4e12, 192e9, 5.3e12, 448e9),
)


def device_peak(device_name: str) -> DevicePeak | None:
    """The entry of a device by the name torch gives it; None for an unknown device (every CPU)."""
    return next((peak for peak in DEVICE_PEAKS if peak.name in device_name), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of a device in FLOP/s; None where it is unknown."""
    peak = device_peak(device_name)
    return None if peak is None else peak.flops(precision)

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

    def flops(self, precision: str) -> float | None:
        """FLOP/s in 'bf16' or 'fp32'."""
        return getattr(self, precision)


# The first entry whose name is part of the device's name counts: longer names stand before the names they contain.
DEVICE_PEAKS: tuple[DevicePeak, ...] = (
    # "NVIDIA GH200 Grace Hopper Superchip Data Sheet": 96 GB (HBM3) or 144 GB (HBM3e).
    DevicePeak("GH200", bf16=990e12, fp32=67e12, memory_bytes=None, memory_bandwidth=None),
    # "NVIDIA H200 Tensor Core GPU Datasheet"; the tensor figures are printed with sparsity, half of them is dense.
    DevicePeak("H200", bf16=989e12, fp32=67e12, memory_bytes=141e9, memory_bandwidth=4.8e12),
    # "NVIDIA H100 Tensor Core GPU Datasheet": PCIe, NVL and SXM.
    DevicePeak("H100 PCIe", bf16=756e12, fp32=51e12, memory_bytes=80e9, memory_bandwidth=2.0e12),
    DevicePeak("H100 NVL", bf16=835e12, fp32=60e12, memory_bytes=94e9, memory_bandwidth=3.9e12),
    DevicePeak("H100", bf16=989e12, fp32=67e12, memory_bytes=80e9, memory_bandwidth=3.35e12),
    # "NVIDIA A100 Tensor Core GPU Datasheet": 40 GB and 80 GB, PCIe and SXM; the same arithmetic.
    DevicePeak("A100-SXM4-80GB", bf16=312e12, fp32=19.5e12, memory_bytes=80e9, memory_bandwidth=2.039e12),
    DevicePeak("A100 80GB PCIe", bf16=312e12, fp32=19.5e12, memory_bytes=80e9, memory_bandwidth=1.935e12),
    DevicePeak("A100", bf16=312e12, fp32=19.5e12, memory_bytes=40e9, memory_bandwidth=1.555e12),
    # "NVIDIA V100 Tensor Core GPU Datasheet" (SXM2): no bfloat16; 16 GB or 32 GB.
    DevicePeak("V100", bf16=None, fp32=15.7e12, memory_bytes=None, memory_bandwidth=0.9e12),
    # "AMD Instinct MI325X Accelerator Data Sheet".
    DevicePeak("MI325X", bf16=1307e12, fp32=163.4e12, memory_bytes=256e9, memory_bandwidth=6.0e12),
    # "AMD Instinct MI300X Accelerator Data Sheet".
    DevicePeak("MI300X", bf16=1307e12, fp32=163.4e12, memory_bytes=192e9, memory_bandwidth=5.3e12),
)


def device_peak(device_name: str) -> DevicePeak | None:
    """The entry of a device by the name torch gives it; None for an unknown device (every CPU)."""
    return next((peak for peak in DEVICE_PEAKS if peak.name in device_name), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of a device in FLOP/s; None where it is unknown."""
    peak = device_peak(device_name)
    return None if peak is None else peak.flops(precision)

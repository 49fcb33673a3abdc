"""Which device this process computes on, and which backend its collectives use."""

from __future__ import annotations

import functools
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Platform:
    """The accelerator of this machine, or its absence."""

    device_type: str
    """'cuda' (NVIDIA, or AMD through a ROCm build of torch) or 'cpu'."""
    backend: str
    """Backend of torch.distributed's collectives: 'nccl' or 'gloo'."""
    name: str
    """The device's name, for logs and benchmarks."""

    @property
    def queues_variable(self) -> str | None:
        """The environment variable that says how many queues of work the device may have; None on a CPU."""
        if self.device_type == "cpu":
            return None
        return "GPU_MAX_HW_QUEUES" if torch.version.hip else "CUDA_DEVICE_MAX_CONNECTIONS"

    def device(self, local_rank: int = 0) -> torch.device:
        """The device of the process with this rank on its node."""
        return torch.device("cpu") if self.device_type == "cpu" else torch.device("cuda", local_rank)

    def use(self, local_rank: int) -> torch.device:
        """Makes that device the current one and returns it."""
        device = self.device(local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def device_count(self) -> int | None:
        """Accelerators visible to this process; None on a CPU, where any number of processes may share it."""
        return torch.cuda.device_count() if self.device_type == "cuda" else None

    def peak_memory_bytes(self) -> int:
        """Most memory this process has held: allocated on the device, or resident on a CPU."""
        if self.device_type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def memory_bytes(self) -> int:
        """Memory this process holds now: allocated on the device, or anonymous and resident on a CPU."""
        if self.device_type == "cuda":
            return torch.cuda.memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # not on Linux
            return self.peak_memory_bytes()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def time_mark(self) -> Any:
        """This moment: on a GPU an event in the current stream, which costs microseconds and waits for nothing."""
        if self.device_type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to another; waits until the device has passed the second."""
        if self.device_type == "cpu":
            return second - first
        second.synchronize()
        return first.elapsed_time(second) / 1e3

    def synchronize(self) -> None:
        """Waits for the work queued on the device."""
        if self.device_type == "cuda":
            torch.cuda.synchronize()

    def synchronize_stream(self) -> None:
        """Waits for the work queued in the current stream, and not for transfers beside it."""
        if self.device_type == "cuda":
            torch.cuda.current_stream().synchronize()


@functools.lru_cache(maxsize=1)
def current_platform() -> Platform:
    """The platform of this machine; decided once."""
    if torch.cuda.is_available():
        return Platform("cuda", "nccl", torch.cuda.get_device_name())
    return Platform("cpu", "gloo", f"CPU ({torch.get_num_threads()} threads)")

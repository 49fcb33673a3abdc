"""Host memory that tensors of a GPU are copied to, beside its work, before a forked process writes them to disk."""

from __future__ import annotations

import contextlib
import mmap
from typing import Optional, Sequence

import torch
from torch import Tensor

from megatron_implicit.device.platform import current_platform

_ALIGNMENT = 64


class HostMemory:
    """One block, kept from one use to the next, page-locked where there is a GPU.

    Locked pages are what a GPU copies to at full speed, and locking them takes its time, so it is done once. The block is
    shared memory: the kernel copies private pages that a device has locked when a process forks, instead of sharing them.
    """

    def __init__(self) -> None:
        self._block: Optional[mmap.mmap] = None
        self._locked: Optional[int] = None
        """Address of the block, where its pages are locked."""
        self._stream: Optional[torch.cuda.Stream] = None
        """Where a GPU copies while it goes on with its work."""

    def begin_copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors in this memory, contiguous; their contents are there after ``finish_copy``, until the next call.

        Each has a storage of its own, no larger than itself: that is what ``torch.save`` writes. Until ``finish_copy`` the
        caller keeps the tensors and changes none of them; what the device was given to do before is done to them first.
        """
        places, size = [], 0
        for tensor in tensors:
            places.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._block is None or len(self._block) < size:
            self._release()
            self._reserve(size)
        with self._beside_the_work():
            return [self._at(place, tensor) for place, tensor in zip(places, tensors, strict=True)]

    def finish_copy(self) -> None:
        """Waits for the copies that were begun."""
        if self._stream is not None:
            self._stream.synchronize()

    def _beside_the_work(self) -> contextlib.AbstractContextManager:
        if current_platform().device_type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _at(self, place: int, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        window = torch.frombuffer(self._block, dtype=tensor.dtype, count=tensor.numel(), offset=place)
        return window.view(tensor.shape).copy_(tensor, non_blocking=True)

    def _reserve(self, size: int) -> None:
        self._block = mmap.mmap(-1, max(size, _ALIGNMENT))  # shared, without a file
        if current_platform().device_type != "cuda":
            return
        address = torch.frombuffer(self._block, dtype=torch.uint8).data_ptr()
        if int(torch.cuda.cudart().cudaHostRegister(address, len(self._block), 0)) == 0:
            self._locked = address
        else:  # copies are slower then
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # takes the error, which CUDA keeps for whoever asks next

    def _release(self) -> None:
        if self._locked is not None:
            torch.cuda.cudart().cudaHostUnregister(self._locked)
        self._block = self._locked = None  # unmapped with the last tensor in it

"""Host memory that tensors of a GPU are copied to before a forked process writes them to disk."""

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

    Locked pages are what a GPU copies to at full speed, and locking them takes a second a gigabyte, so it is done once.
    The block is shared memory: a fork would copy private locked pages, all of them, before it returned.
    """

    def __init__(self) -> None:
        self._block: Optional[Tensor] = None
        self._locked = False

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors in this memory, contiguous; their contents are there when it returns, until the next call."""
        places, size = [], 0
        for tensor in tensors:
            places.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._block is None or len(self._block) < size:
            self._release()
            self._reserve(size)
        copies = []
        for tensor, place in zip(tensors, places, strict=True):
            bytes_of_it = self._block[place : place + tensor.nbytes]
            copies.append(bytes_of_it.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True))
        current_platform().synchronize()
        return copies

    def _reserve(self, size: int) -> None:
        self._block = torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)  # shared, without a file
        if current_platform().device_type == "cuda":
            self._locked = int(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), len(self._block), 0)) == 0
            if not self._locked:  # copies are slower then
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")  # takes the error, which CUDA keeps for whoever asks next

    def _release(self) -> None:
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._block, self._locked = None, False

"""Memory that a checkpoint's tensors are copied to before a fork writes them."""

from __future__ import annotations

import os
import struct

import torch

from megatron_implicit.device.host_memory import HostMemory


def copied(memory: HostMemory, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    copies = memory.begin_copy(tensors)
    memory.finish_copy()
    return copies


def test_copies_are_equal_and_the_memory_is_kept() -> None:
    memory = HostMemory()
    tensors = [torch.randn(3, 5).t(), torch.randn(7).bfloat16(), torch.tensor(3.0), torch.empty(0), torch.arange(9)]
    copies = copied(memory, tensors)
    assert all(torch.equal(copy, tensor) and copy.is_contiguous() for copy, tensor in zip(copies, tensors, strict=True))
    assert all(copy.untyped_storage().nbytes() == tensor.nbytes for copy, tensor in zip(copies, tensors, strict=True))
    place = copies[0].data_ptr()
    assert copied(memory, tensors[1:])[0].data_ptr() == place
    assert torch.equal(copied(memory, [torch.ones(1000)])[0], torch.ones(1000))  # a larger one


def test_a_fork_reads_the_copies() -> None:
    """From locked pages too, where there is a GPU."""
    tensor = torch.arange(100_000.0, device="cuda" if torch.cuda.is_available() else "cpu")
    (copy,) = copied(HostMemory(), [tensor])
    assert copy.is_pinned() == torch.cuda.is_available()
    expected = float(tensor.double().sum())
    tensor.zero_()
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, struct.pack("d", float(copy.numpy().sum(dtype="float64"))))
        os._exit(0)
    assert struct.unpack("d", os.read(reader, 8)) == (expected,)
    os.wait()

"""Repairs the packed state of Megatron-Core's distributed optimizer where its buffers have more than one bucket.

Upstream packs the state of all buckets without the padding at their ends, and then cuts parameters out of it at offsets
that count the padding ("data corruption", says its own warning, where it notices at all). A bucket of its own is what
every parameter gets that several pipeline stages hold. Saving goes without the packed state (``optimizer_shards``);
loading takes the room for every parameter from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def repair_bucket_padding() -> None:
    """Wraps DistributedOptimizer.get_parameter_state_dp_zero; idempotent because prepare_megatron() runs once."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    packed_state = DistributedOptimizer.get_parameter_state_dp_zero

    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = packed_state(self, *args, **kwargs)
        if state is not None:
            for index, buffer in enumerate(self.buffers):
                for tensors in state[index].values():
                    padded = {name: _padded(value, buffer) for name, value in tensors.items() if torch.is_tensor(value)}
                    tensors.update(padded)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = get_parameter_state_dp_zero


def _padded(packed: Tensor, buffer: Any) -> Tensor:
    """The buckets' elements at their offsets in the buffer."""
    if len(buffer.buckets) == 1:
        return packed
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    padded = packed.new_zeros(buffer.numel)
    for bucket, elements in zip(buffer.buckets, packed.split(sizes)):
        padded[bucket.offset : bucket.offset + len(elements)] = elements
    return padded

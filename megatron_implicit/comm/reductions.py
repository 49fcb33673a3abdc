"""Sums and agreements over a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``value`` over the group, with the same sum of its gradient in the backward pass.

    Every rank uses the sum for its own shard, so each holds only a part of the gradient: both directions reduce.
    """
    if group.size() == 1:
        return value
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )

    return copy_to_tensor_model_parallel_region(
        reduce_from_tensor_model_parallel_region(value, group=group), group=group
    )


def shared_by(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``value`` itself, which all ranks hold; its gradient, of which each has a part, is summed over the group."""
    if group.size() == 1:
        return value
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    return copy_to_tensor_model_parallel_region(value, group=group)


def from_last_stage(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the last pipeline stage holds, in place on all of them; every rank must call it.

    Args:
        value: of the same shape and dtype everywhere.
        group: the pipeline group.
    """
    if group.size() > 1:
        dist.broadcast(value, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return value


class ResidualReducer:
    """Makes the sums of squares behind a residual the same numbers on all ranks of a model replica.

    Where the iterate is sharded along the sequence the ranks' sums are added. Where every rank holds the whole
    iterate, the first rank's sums are taken by all: a decision made from numbers that differ in the last bit would
    stop one rank early, and that is a deadlock.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, sharded: bool) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self._sharded = sharded

    @torch.no_grad()
    def __call__(self, sums: Tensor) -> Tensor:
        """Reduces ``sums`` in place and returns it."""
        if self._group is None:
            return sums
        if self._sharded:
            dist.all_reduce(sums, group=self._group)
        else:
            dist.broadcast(sums, src=dist.get_global_rank(self._group, 0), group=self._group)
        return sums

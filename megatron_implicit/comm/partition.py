"""Which contiguous slice of a dimension each rank of the tensor group owns.

A dimension that does not divide (the paper's FFN width 5461, its vocabulary 50277) has a *logical* size, which
parameters, gradients, optimizer state and checkpoints have, and a *computed* size: every rank computes with equal
slices, padded by zeros that exist only in the assembled weight. Padding therefore never reaches a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_implicit.errors import ConfigError


@dataclass(frozen=True)
class Partition:
    """The slice of a dimension of ``logical`` elements that one of ``ranks`` ranks owns."""

    logical: int
    """Elements of the whole dimension."""
    ranks: int
    """Ranks it is divided over."""
    rank: int
    """The rank this slice belongs to."""
    computed: int
    """Elements each rank computes with; at least its own."""

    @property
    def start(self) -> int:
        """First element of this rank."""
        return min(self.rank * self.computed, self.logical)

    @property
    def stop(self) -> int:
        """One past the last element of this rank."""
        return min((self.rank + 1) * self.computed, self.logical)

    @property
    def size(self) -> int:
        """Elements this rank owns."""
        return self.stop - self.start

    @property
    def padding(self) -> int:
        """Zeros this rank computes with on top of its own elements."""
        return self.computed - self.size

    @property
    def even(self) -> bool:
        """Whether every rank owns the same number of elements."""
        return self.computed * self.ranks == self.logical


def partition(logical: int, ranks: int, rank: int, *, align: bool = False) -> Partition:
    """Divides ``logical`` elements over ``ranks``.

    Args:
        logical: elements of the dimension.
        ranks: size of the tensor group.
        rank: this rank's place in it.
        align: allow uneven slices and round the computed size up for matrix units (to 64 from 1024 elements on,
            else to 8, unless that leaves a rank without elements); without it the dimension must divide.

    Raises:
        ConfigError: it does not divide, or a rank would own nothing.
    """
    if not align:
        if logical % ranks:
            raise ConfigError(f"a dimension of {logical} does not divide over parallel.tensor={ranks}: lower it")
        return Partition(logical, ranks, rank, logical // ranks)
    share = math.ceil(logical / ranks)
    for unit in (64, 8, 1) if share >= 1024 else (8, 1):
        computed = math.ceil(share / unit) * unit
        if (ranks - 1) * computed < logical:
            return Partition(logical, ranks, rank, computed)
    raise ConfigError(f"a dimension of {logical} is too small for parallel.tensor={ranks}: lower parallel.tensor")

"""Where a rank's parameters sit in the whole tensors: for distributed checkpoints and for conversion.

Every module of ours that owns parameters says so once, through ``Placed.placement``; checkpoint shards (uneven ones
included) and the mapping to other formats are both derived from it.
"""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Optional

import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.comm.partition import Partition


class Placement(NamedTuple):
    """A rank's slice of a whole tensor."""

    axis: int
    partition: Partition


class Placed:
    """Mixin of modules that own parameters: which slice of each this rank holds.

    A subclass sets ``tp_group`` and may override ``placement``; without that every tensor rank holds the whole.
    """

    tp_group: dist.ProcessGroup

    def placement(self, name: str) -> Optional[Placement]:
        """The slice of the parameter ``name``; None if every rank of the tensor group holds all of it."""
        return None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Shards of the module's own parameters, then of its submodules."""
        shards = {
            f"{prefix}{name}": sharded_parameter(
                parameter, f"{prefix}{name}", self.placement(name), self.tp_group, metadata
            )
            for name, parameter in self.named_parameters(recurse=False)
        }
        for name, module in self.named_children():
            shards.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return shards


class PlacedParameter(NamedTuple):
    """A parameter with its name in the model and this rank's slice of it."""

    name: str
    parameter: nn.Parameter
    placement: Optional[Placement]


def placed_parameters(named_modules: Iterator[tuple[str, nn.Module]]) -> Iterator[PlacedParameter]:
    """All parameters of modules that are Placed, by the names that ``named_modules`` gives."""
    for prefix, module in named_modules:
        if isinstance(module, Placed):
            for name, parameter in module.named_parameters(recurse=False):
                yield PlacedParameter(f"{prefix}.{name}", parameter, module.placement(name))


def sharded_parameter(
    parameter: Tensor,
    key: str,
    where: Optional[Placement],
    group: dist.ProcessGroup,
    metadata: Optional[dict[str, Any]],
) -> Any:
    """A ShardedTensor of logical size.

    Args:
        parameter: the rank's slice; kept as it is, since optimizer state is matched by identity.
        key: name in the checkpoint.
        where: the slice; None if every tensor rank holds the whole.
        group: the tensor group.
        metadata: Megatron-Core's; its ``dp_cp_group`` tells the data-parallel replicas apart.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    data_rank = metadata["dp_cp_group"].rank() if metadata and metadata.get("dp_cp_group") is not None else 0
    if where is None:
        return ShardedTensor.from_rank_offsets(key, parameter, replica_id=(0, group.rank(), data_rank))
    axis, part = where
    if part.even:
        return ShardedTensor.from_rank_offsets(
            key, parameter, (axis, part.rank, part.ranks), replica_id=(0, 0, data_rank)
        )
    shape, offset = list(parameter.shape), [0] * parameter.ndim
    shape[axis], offset[axis] = part.logical, part.start
    return ShardedTensor(
        key=key,
        data=parameter,
        dtype=parameter.dtype,
        local_shape=tuple(parameter.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # an uneven grid
        replica_id=(0, 0, data_rank),
    )

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
    copy_number: int = 0
    """Which of the copies this is, where several pipeline stages have one (see ``mark_copies``)."""

    def placement(self, name: str) -> Optional[Placement]:
        """The slice of the parameter ``name``; None if every rank of the tensor group holds all of it."""
        return None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Shards of the module's own parameters, then of its submodules."""
        shards = {
            f"{prefix}{name}": sharded_parameter(
                parameter, f"{prefix}{name}", self.placement(name), self.tp_group, metadata, self.copy_number
            )
            for name, parameter in self.named_parameters(recurse=False)
        }
        for name, module in self.named_children():
            shards.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return shards


def mark_copies(module: nn.Module, number: int) -> None:
    """Says that several pipeline stages have a copy of all parameters below ``module``; this is copy ``number``.

    Megatron-Core then sums their gradients over the stages (``pipeline_parallel``), counts only the first copy in the
    gradient norm (``shared``), and lets the distributed optimizer divide all copies in the same way, so that it can
    sum them after it has scattered them (``shared_embedding``). Checkpoints hold the first copy.
    """
    for child in module.modules():
        if isinstance(child, Placed):
            child.copy_number = number
    for parameter in module.parameters():
        parameter.pipeline_parallel = parameter.shared_embedding = True
        parameter.shared = number > 0


class PlacedParameter(NamedTuple):
    """A parameter with its name in the model, this rank's slice of it, and which copy of several it is."""

    name: str
    parameter: nn.Parameter
    placement: Optional[Placement]
    copy_number: int


def placed_parameters(named_modules: Iterator[tuple[str, nn.Module]]) -> Iterator[PlacedParameter]:
    """All parameters of modules that are Placed, by the names that ``named_modules`` gives."""
    for prefix, module in named_modules:
        if isinstance(module, Placed):
            for name, parameter in module.named_parameters(recurse=False):
                yield PlacedParameter(f"{prefix}.{name}", parameter, module.placement(name), module.copy_number)


def sharded_parameter(
    parameter: Tensor,
    key: str,
    where: Optional[Placement],
    group: dist.ProcessGroup,
    metadata: Optional[dict[str, Any]],
    copy_number: int = 0,
) -> Any:
    """A ShardedTensor of logical size.

    Args:
        parameter: the rank's slice; kept as it is, since optimizer state is matched by identity.
        key: name in the checkpoint.
        where: the slice; None if every tensor rank holds the whole.
        group: the tensor group.
        metadata: Megatron-Core's; its ``dp_cp_group`` tells the data-parallel replicas apart.
        copy_number: of copies on several pipeline stages; the first one is saved.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    data_rank = metadata["dp_cp_group"].rank() if metadata and metadata.get("dp_cp_group") is not None else 0
    if where is None:
        return ShardedTensor.from_rank_offsets(key, parameter, replica_id=(copy_number, group.rank(), data_rank))
    axis, part = where
    if part.even:
        return ShardedTensor.from_rank_offsets(
            key, parameter, (axis, part.rank, part.ranks), replica_id=(copy_number, 0, data_rank)
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
        replica_id=(copy_number, 0, data_rank),
    )

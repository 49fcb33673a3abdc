"""Makes Megatron-Core's distributed optimizer save its state piece by piece, as each replica has it.

Upstream's format that any layout can read ('fully_reshardable') gathers the whole state on every replica first and
copies it to the host several times over, while training waits and every rank needs 12 bytes of host memory a parameter.
The same format needs none of it: what a replica owns of a parameter is a range of its elements in memory order, a few
boxes of the tensor, and a checkpoint takes any boxes that cover the tensor. Loading is upstream's.
"""

from __future__ import annotations

import math
from typing import Any, Iterator, NamedTuple

from torch import Tensor

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, in upstream's words."""


class Box(NamedTuple):
    """A contiguous range of a tensor's elements that is a box of the tensor."""

    offset: tuple[int, ...]
    """Of its first element, by dimension."""
    size: tuple[int, ...]
    elements: int


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements ``start`` to ``stop`` of a tensor in memory order, as at most 2·d - 1 boxes for d dimensions, in order."""
    if start >= stop:
        return []
    if len(shape) < 2:
        return [Box((start,) * len(shape), (stop - start,) * len(shape), stop - start)]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    found = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    if first < last:
        found.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), (last - first) * row))
    return found + _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> list[Box]:
    return [Box((index, *box.offset), (1, *box.size), box.elements) for box in boxes(shape[1:], start, stop)]


def save_optimizer_in_pieces() -> None:
    """Wraps DistributedOptimizer.sharded_param_state_fully_reshardable; prepare_megatron() calls it once."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    gathered = DistributedOptimizer.sharded_param_state_fully_reshardable

    def sharded_param_state_fully_reshardable(
        self: Any, model_shards: dict, is_loading: bool = False, metadata: dict | None = None
    ) -> Any:
        return gathered(self, model_shards, is_loading, metadata) if is_loading else _pieces(self, model_shards)

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state_fully_reshardable


def _pieces(optimizer: Any, model_shards: dict) -> dict[int, dict[str, Any]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    shard_of = {shard.data: shard for shard in nested_values(model_shards) if isinstance(shard.data, Tensor)}
    return {
        number: dict(_pieces_of(shard_of[parameter], start, stop, state))
        for number, (parameter, start, stop, state) in enumerate(_owned(optimizer))
    }


def _owned(optimizer: Any) -> Iterator[tuple[Tensor, int, int, dict[str, Tensor]]]:
    """Parameters of which this replica owns a part: from which element to which, and its state, [stop - start] each."""
    for by_type in optimizer.gbuf_ranges:
        for buckets in by_type.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    state = optimizer._get_main_param_and_optimizer_states(parameter)
                    yield parameter, ranges["param"].start, ranges["param"].end, state


def _pieces_of(shard: Any, start: int, stop: int, state: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for key in STATE_KEYS:
        begin, elements = 0, state[key].detach().flatten()
        for number, box in enumerate(boxes(tuple(shard.local_shape), start, stop)):
            yield f"{key}.{number}", ShardedTensor(
                key=f"optimizer.state.{key}.{shard.key}",
                data=elements[begin : begin + box.elements].view(box.size),
                dtype=elements.dtype,
                local_shape=box.size,
                global_shape=shard.global_shape,
                global_offset=tuple(base + inner for base, inner in zip(shard.global_offset, box.offset, strict=True)),
                axis_fragmentations=None,  # no grid
                replica_id=(*shard.replica_id[:-1], 0),  # no other replica has it
            )
            begin += box.elements

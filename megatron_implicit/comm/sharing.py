"""What one rank of a group knows, for all of them."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_last(value: T, group: dist.ProcessGroup) -> T:
    """The last rank's value (of a pipeline: of the last stage), pickled; tensors should be on the CPU.

    Every rank of the group must call it.
    """
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return box[0]

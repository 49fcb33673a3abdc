"""What all ranks of a job agree on beside the computation: small integers, over a group of their own.

The group is Gloo's on every machine, so that an agreement neither waits for a device nor orders itself among the
collectives of the computation.
"""

from __future__ import annotations

import datetime
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor


_current: list[tuple[Any, dist.ProcessGroup]] = []
"""The world and its control group."""


def control_group(timeout_minutes: float = 10.0) -> dist.ProcessGroup:
    """The group of all ranks for words and small numbers; all ranks must make the first call, which sets its timeout."""
    if not _current or _current[0][0] is not dist.group.WORLD:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        _current[:] = [(dist.group.WORLD, dist.new_group(backend="gloo", timeout=timeout))]
    return _current[0][1]


def largest(value: int) -> int:
    """The largest ``value`` that any rank gives; every rank must call it."""
    result = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=control_group())
    return int(result)


def first_problem(problem: Optional[str]) -> Optional[str]:
    """A problem that some rank has (the lowest rank's), None if no rank has any; every rank must call it."""
    if not largest(problem is not None):
        return None
    problems: list[Optional[str]] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=control_group())
    return next(text for text in problems if text is not None)


class Agreement:
    """The largest value that any rank proposes under each name, reduced while the ranks compute."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: Optional[Tensor] = None
        self._work: Optional[dist.Work] = None

    def begin(self, proposals: dict[str, int]) -> None:
        """Starts the exchange; the names must be the same on all ranks, in the same order."""
        self._names = list(proposals)
        self._values = torch.tensor(list(proposals.values()), dtype=torch.int64)
        self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=control_group(), async_op=True)

    def end(self) -> dict[str, int]:
        """Waits for the exchange and returns what was agreed."""
        self._work.wait()
        return dict(zip(self._names, self._values.tolist()))

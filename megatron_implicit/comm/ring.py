"""Process groups of a pipeline whose messages go round: one for headers, one a link and direction of travel.

Groups are collective to create: every process of the job makes all of them, in the same order, once.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional, Sequence

import torch
import torch.distributed as dist

from megatron_implicit.device import current_platform
from megatron_implicit.errors import LaunchError

FEWEST_QUEUES = 8
"""Streams that wait for others at the same time: computation, four links, and collectives of tensor and data ranks."""


class Direction(enum.IntEnum):
    """Which way round; the values are tags of the header group."""

    FORWARD = 1
    """From stage p to p + 1, and from the last stage to stage 0."""
    BACKWARD = 2
    """From stage p to p - 1, and from stage 0 to the last stage."""

    def receiver(self, stage: int, stages: int) -> int:
        """The stage that gets what ``stage`` sends."""
        return (stage + (1 if self is Direction.FORWARD else -1)) % stages

    def sender(self, stage: int, stages: int) -> int:
        """The stage that sends what ``stage`` gets."""
        return (stage - (1 if self is Direction.FORWARD else -1)) % stages


@dataclass(frozen=True)
class Ring:
    """One pipeline, seen from one of its processes."""

    ranks: tuple[int, ...]
    """Global ranks by stage."""
    stage: int
    """This process's stage."""
    timeout_s: float
    """Seconds after which a message that does not arrive ends the job."""
    headers: dist.ProcessGroup
    """Gloo, all stages: what is on its way. Tags are directions."""
    payloads: dict[tuple[Direction, int], dist.ProcessGroup]
    """By direction and sending stage: a group of the two ends of each link. Two stages share four of them: NCCL has no
    tags, and a communicator runs its transfers in order."""
    tensor_ranks: dist.ProcessGroup
    """Gloo, the tensor-parallel ranks of this stage: followers learn here what their leader does."""

    @property
    def stages(self) -> int:
        """P."""
        return len(self.ranks)

    def receiver(self, direction: Direction) -> int:
        """The stage that gets what this one sends."""
        return direction.receiver(self.stage, self.stages)

    def sender(self, direction: Direction) -> int:
        """The stage that sends what this one gets."""
        return direction.sender(self.stage, self.stages)

    def outgoing(self, direction: Direction) -> dist.ProcessGroup:
        """The group of this stage's outgoing link."""
        return self.payloads[direction, self.stage]

    def incoming(self, direction: Direction) -> dist.ProcessGroup:
        """The group of this stage's incoming link."""
        return self.payloads[direction, self.sender(direction)]

    def warm(self, device: torch.device) -> None:
        """Sends one element over every link, one after another: NCCL connects at the first use, and both ends must
        come to it in the same order."""
        staged = dist.get_backend(self.outgoing(Direction.FORWARD)) == "gloo"
        device = torch.device("cpu") if staged else device
        for direction in Direction:
            for sender in range(self.stages):
                token = torch.zeros(1, device=device)
                if sender == self.stage:
                    dist.send(token, self.ranks[self.receiver(direction)], group=self.outgoing(direction))
                elif sender == self.sender(direction):
                    dist.recv(token, self.ranks[sender], group=self.incoming(direction))
        if device.type != "cpu":
            current_platform().synchronize()


def refuse_few_queues(environment: Mapping[str, str]) -> None:
    """For payloads that do not pass through host memory: what waits for other stages needs queues of the device.

    A transfer waits for its other end. What follows in the same queue, another link's transfer or the computation that
    the other end needs, would wait behind it, and so on round the ring.

    Args:
        environment: variables of this process. What they leave unset is the driver's default, which suffices.

    Raises:
        LaunchError: they allow the device fewer queues than a stage has such streams.
    """
    name = current_platform().queues_variable
    value = environment.get(name, "") if name else ""
    if value.isdigit() and int(value) < FEWEST_QUEUES:
        raise LaunchError(
            f"{name}={value} holds work up behind transfers between pipeline stages, until they hang: set it to "
            f"{FEWEST_QUEUES} or more, or parallel.pipeline_transport=host"
        )


def make_ring(
    pipelines: Sequence[Sequence[int]], tensor_groups: Sequence[Sequence[int]], timeout_minutes: float,
    *, host_payloads: bool,
) -> Optional[Ring]:  # fmt: skip
    """Makes the groups of all pipelines of a job; every process must call it with the same arguments.

    Args:
        pipelines: global ranks by stage, for every pipeline.
        tensor_groups: global ranks of every group of tensor-parallel ranks, leader first; every rank is in one.
        timeout_minutes: after which a transfer fails.
        host_payloads: send payloads over Gloo, through host memory, whatever the device.

    Returns:
        this process's ring; None if it is in no pipeline.
    """
    rank, timeout = dist.get_rank(), datetime.timedelta(minutes=timeout_minutes)
    backend = "gloo" if host_payloads else current_platform().backend
    followers: dict[int, dist.ProcessGroup] = {}
    for ranks in tensor_groups:
        group = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        followers |= {member: group for member in ranks}
    own = None
    for ranks in pipelines:
        headers = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        payloads = {
            (direction, stage): dist.new_group(
                sorted((ranks[stage], ranks[direction.receiver(stage, len(ranks))])), timeout=timeout, backend=backend
            )
            for direction in Direction
            for stage in range(len(ranks))
        }
        if rank in ranks:
            own = Ring(
                tuple(ranks), list(ranks).index(rank), timeout.total_seconds(), headers, payloads, followers[rank]
            )
    return own


_RING_OF_LAYOUT: Optional[tuple[dist.ProcessGroup, Ring]] = None
"""The pipeline group that Megatron-Core's layout has and the ring made for it."""


def ring_of_layout(timeout_minutes: float, *, host_payloads: bool) -> Ring:
    """The ring of this process's pipeline in Megatron-Core's layout, made once; every process must call it."""
    from megatron.core import parallel_state

    global _RING_OF_LAYOUT
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if _RING_OF_LAYOUT is None or _RING_OF_LAYOUT[0] is not pipeline:
        _RING_OF_LAYOUT = pipeline, make_ring(
            _all_groups(pipeline), _all_groups(parallel_state.get_tensor_model_parallel_group()), timeout_minutes,
            host_payloads=host_payloads,
        )  # fmt: skip
    return _RING_OF_LAYOUT[1]


def _all_groups(own: dist.ProcessGroup) -> list[tuple[int, ...]]:
    """The ranks of every process's group of this kind, each group once."""
    groups: list[Optional[tuple[int, ...]]] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, tuple(dist.get_process_group_ranks(own)))
    return sorted(set(groups))

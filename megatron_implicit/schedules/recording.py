"""What a stage did and when: the event graph of a real step, for replays and timelines."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from megatron_implicit.schedules.protocol import Kind


class TaskRecord(NamedTuple):
    """One task of one stage."""

    stage: int
    kind: Kind
    microbatch: int
    evaluation: int
    """As in the message."""
    start: float
    """Seconds of ``time.perf_counter`` on the stage's host."""
    end: float
    """When it was computed; what it sends leaves then."""


class Recorder(Protocol):
    """Gets every task of the stage it is attached to, in the order they were computed."""

    def record(self, task: TaskRecord) -> None:
        """Called by the driver after a task."""

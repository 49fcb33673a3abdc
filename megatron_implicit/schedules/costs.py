"""What the tasks and messages of a schedule cost in seconds: assumed, predicted by the planner, or measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Iterable, Mapping, Protocol, Sequence

from megatron_implicit.schedules.protocol import Kind, Message, StepPlan
from megatron_implicit.schedules.recording import TaskRecord


class TaskCosts(Protocol):
    """Seconds of a task."""

    def seconds(self, stage: int, task: Message) -> float:
        """Of computing ``task`` on ``stage``."""


@dataclass(frozen=True)
class StageCosts:
    """Seconds of one stage's tasks, where they are known by their parts."""

    solve: float
    """A pass of this stage's slice without gradient."""
    phantom: float
    """A pass with gradient."""
    backward: float
    """The backward pass of one."""
    admission: float = 0.0
    """On top of a microbatch's first pass: its injection u, on stage 0 the embedding too."""
    admission_backward: float = 0.0
    """On top of a microbatch's last backward pass: the same, backwards."""
    judge: float = 0.0
    """Last stage, on top of every forward pass: final norm, residual, decision."""
    head: float = 0.0
    """Last stage, on top of a microbatch's last pass: logits and loss, with their backward pass at once if there is
    one."""


@dataclass(frozen=True)
class PartCosts:
    """The tasks of a step by the parts of each stage's costs."""

    plan: StepPlan
    stages: Sequence[StageCosts]

    @classmethod
    def equal(cls, plan: StepPlan, forward: float = 1.0, backward: float = 2.0) -> "PartCosts":
        """All stages alike, nothing on top: the textbook's pipeline."""
        return cls(plan, [StageCosts(forward, forward, backward)] * plan.stages)

    def seconds(self, stage: int, task: Message) -> float:
        """Of computing ``task`` on ``stage``."""
        costs = self.stages[stage]
        if task.kind is Kind.BACKWARD:
            return costs.backward + (costs.admission_backward if task.evaluation == 0 else 0.0)
        total = costs.phantom if task.kind is Kind.PHANTOM else costs.solve
        if self.plan.admits(task):
            total += costs.admission
        if stage < self.plan.stages - 1:
            return total
        last = task.kind is Kind.PHANTOM and task.evaluation == self.plan.passes - 1
        return total + costs.judge + (costs.head if last or task.kind is Kind.OUTPUT else 0.0)


class MeasuredCosts:
    """Medians of a recorded run, by stage and by what distinguishes tasks: their kind, and whether they are a
    microbatch's first or last of it (which carry injection and head).

    Args:
        plan: the step that was recorded.
        records: of all stages; several steps may follow one another.
    """

    def __init__(self, plan: StepPlan, records: Iterable[TaskRecord]) -> None:
        self._plan = plan
        seconds: dict[tuple, list[float]] = defaultdict(list)
        for record in records:
            task = Message(record.kind, record.microbatch, record.evaluation)
            seconds[self._group(record.stage, task)].append(record.end - record.start)
        self._medians = {group: statistics.median(values) for group, values in seconds.items()}

    def seconds(self, stage: int, task: Message) -> float:
        """Median of the tasks of this sort on ``stage``.

        Raises:
            KeyError: none was recorded.
        """
        return self._medians[self._group(stage, task)]

    def by_stage(self) -> list[dict[str, float]]:
        """The medians for people to read, by stage and sort of task."""
        stages: list[dict[str, float]] = [{} for _ in range(self._plan.stages)]
        for (stage, kind, first, last), seconds in sorted(self._medians.items()):
            words = [kind.name.lower(), *["first"] * first, *["last"] * last]
            stages[stage][" ".join(words)] = seconds
        return stages

    def _group(self, stage: int, task: Message) -> tuple:
        return stage, task.kind, task.evaluation == 0, task.evaluation == self._plan.passes - 1 and task.kind in (
            Kind.PHANTOM,
            Kind.BACKWARD,
        )


@dataclass(frozen=True)
class Link:
    """A directed connection between two stages. Messages follow one another."""

    latency: float = 0.0
    """Seconds until the first byte arrives."""
    bandwidth: float = float("inf")
    """Bytes a second."""


@dataclass(frozen=True)
class LinkCosts:
    """The ring's connections and what a payload weighs."""

    default: Link = Link()
    """Every connection that ``between`` does not name."""
    between: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    """Connections by (sender, receiver)."""
    tensor_bytes: float = 0.0
    """Bytes of one tensor of a payload."""

    def link(self, sender: int, receiver: int) -> Link:
        """The connection from ``sender`` to ``receiver``."""
        return self.between.get((sender, receiver), self.default)

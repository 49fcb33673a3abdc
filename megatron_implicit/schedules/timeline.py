"""What the stages did in a step, and when: simulated, replayed or recorded. Its bubble, and a trace for Perfetto."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from megatron_implicit.schedules.protocol import Kind, Message, StepPlan
from megatron_implicit.schedules.recording import TaskRecord


@dataclass(frozen=True)
class Timeline:
    """The tasks of all stages of one step."""

    plan: StepPlan
    tasks: tuple[TaskRecord, ...]
    """Each stage's in the order it computed them."""

    @property
    def makespan(self) -> float:
        """Seconds from the first task's start to the last one's end."""
        return max(task.end for task in self.tasks) - min(task.start for task in self.tasks)

    @property
    def busy(self) -> list[float]:
        """Seconds each stage computes."""
        seconds = [0.0] * self.plan.stages
        for task in self.tasks:
            seconds[task.stage] += task.end - task.start
        return seconds

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they do not compute: 1 - sum(busy) / (P x makespan)."""
        return 1.0 - sum(self.busy) / (self.plan.stages * self.makespan)

    @property
    def imbalance(self) -> float:
        """The part of the bubble that no schedule removes: 1 - mean(busy) / max(busy), 0 for stages with equal work."""
        return 1.0 - sum(self.busy) / (self.plan.stages * max(self.busy))

    @property
    def evaluations(self) -> list[int]:
        """Evaluations of each microbatch's solve."""
        counted = Counter(task.microbatch for task in self.tasks if task.kind is Kind.SOLVE and task.stage == 0)
        return [counted[microbatch] for microbatch in range(self.plan.microbatches)]

    def order(self, stage: int) -> list[Message]:
        """The tasks of a stage, in the order it computed them."""
        return [Message(task.kind, task.microbatch, task.evaluation) for task in self.tasks if task.stage == stage]

    def most_at_once(self, first: Kind, last: Kind) -> int:
        """Most microbatches between the start of their first task of one kind and the end of their last of another:
        (SOLVE, SOLVE) are solving, (PHANTOM, BACKWARD) hold graphs, (SOLVE, BACKWARD) are in flight."""
        starts: dict[int, float] = {}
        ends: dict[int, float] = {}
        for task in self.tasks:
            if task.kind is first:
                starts[task.microbatch] = min(starts.get(task.microbatch, task.start), task.start)
            if task.kind is last:
                ends[task.microbatch] = max(ends.get(task.microbatch, task.end), task.end)
        changes = sorted([(time, 1) for time in starts.values()] + [(time, -1) for time in ends.values()])
        alive = most = 0
        for _, change in changes:
            alive += change
            most = max(most, alive)
        return most


def cut_into_steps(plan: StepPlan, records: Iterable[TaskRecord]) -> list[Timeline]:
    """The steps of a recorded run.

    Args:
        plan: of every step.
        records: of all stages, each stage's in the order it computed them; whole steps.
    """
    steps: dict[int, list[TaskRecord]] = defaultdict(list)
    finished: Counter[int] = Counter()
    for record in records:
        steps[finished[record.stage] // plan.microbatches].append(record)
        last = Kind.BACKWARD if plan.passes else Kind.OUTPUT
        finished[record.stage] += record.kind is last and record.evaluation == 0
    return [Timeline(plan, tuple(tasks)) for tasks in steps.values()]


def write_trace(path: str | Path, timelines: Mapping[str, Timeline]) -> None:
    """Writes timelines as one Chrome trace, which https://ui.perfetto.dev and chrome://tracing open: a process for
    each timeline, a track for each stage, arrows for messages that set off the next pass."""
    events = [event for number, (name, line) in enumerate(timelines.items()) for event in _events(number, name, line)]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


_COLOURS = {Kind.SOLVE: "good", Kind.OUTPUT: "good", Kind.PHANTOM: "bad", Kind.BACKWARD: "terrible"}


def _events(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    for stage in range(timeline.plan.stages):
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": stage, "args": {"name": f"stage {stage}"}}
    origin = min(task.start for task in timeline.tasks)
    for task in timeline.tasks:
        yield {
            "ph": "X", "pid": process, "tid": task.stage, "cat": task.kind.name.lower(), "cname": _COLOURS[task.kind],
            "name": f"{task.kind.name.lower()} m{task.microbatch} e{task.evaluation}",
            "ts": (task.start - origin) * 1e6, "dur": (task.end - task.start) * 1e6,
            "args": {"microbatch": task.microbatch, "evaluation": task.evaluation},
        }  # fmt: skip
    yield from _arrows(process, timeline.tasks, origin)


def _arrows(process: int, tasks: Sequence[TaskRecord], origin: float) -> Iterator[dict[str, Any]]:
    """One flow a microbatch: from each of its tasks to the next."""
    flows: dict[int, list[TaskRecord]] = defaultdict(list)
    for task in tasks:
        flows[task.microbatch].append(task)
    for microbatch, flow in flows.items():
        flow.sort(key=lambda task: task.start)
        for index, task in enumerate(flow):
            yield {
                "ph": "s" if index == 0 else "f" if index == len(flow) - 1 else "t", "bp": "e", "cat": "microbatch",
                "name": f"microbatch {microbatch}", "id": f"{process}.{microbatch}", "pid": process, "tid": task.stage,
                "ts": (task.start - origin) * 1e6,
            }  # fmt: skip

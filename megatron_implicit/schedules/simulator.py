"""Discrete-event simulation of a step: the stages' own logic, with a clock and costs in place of tensors and ranks.

One simulator serves the tests of the schedule (it runs any number of stages, limits, costs and evaluations, and finds
deadlocks), replays of recorded steps, and the planner. It decides nothing itself: every task is chosen by a
``StageLogic``, or is the next of a recorded order.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from itertools import count
from typing import Optional, Sequence

from megatron_implicit.errors import MegatronImplicitError
from megatron_implicit.schedules.costs import LinkCosts, TaskCosts
from megatron_implicit.schedules.logic import Send, StageLogic
from megatron_implicit.schedules.protocol import Kind, Message, StepPlan
from megatron_implicit.schedules.recording import TaskRecord
from megatron_implicit.schedules.timeline import Timeline
from megatron_implicit.solver import Step


class DeadlockError(MegatronImplicitError):
    """No stage has anything to do and the step is not finished; names every stage that waits."""


def simulate(
    plan: StepPlan,
    evaluations: Sequence[int],
    costs: TaskCosts,
    links: LinkCosts = LinkCosts(),
    orders: Optional[Sequence[Sequence[Message]]] = None,
) -> Timeline:
    """Runs a step.

    Args:
        plan: the step.
        evaluations: of each microbatch's solve, 1 or more; unused in an unrolled step.
        costs: seconds of the tasks.
        links: seconds of the messages.
        orders: by stage, tasks in a fixed order (of a recorded run); None lets the logic choose.

    Raises:
        DeadlockError: the schedule cannot go on.
        ValueError: not one number of evaluations a microbatch.
    """
    if len(evaluations) != plan.microbatches or (min(evaluations) < 1 and not plan.unrolled):
        raise ValueError(f"{plan.microbatches} microbatches need as many numbers of evaluations, all at least 1")
    return _Simulation(plan, evaluations, costs, links, orders).run()


def replay(recorded: Timeline, costs: TaskCosts, links: LinkCosts = LinkCosts()) -> Timeline:
    """A recorded step again: the same tasks in the same order on every stage, with other costs."""
    orders = [recorded.order(stage) for stage in range(recorded.plan.stages)]
    return simulate(recorded.plan, recorded.evaluations, costs, links, orders)


class _Simulation:
    """The event loop: tasks that end and messages that arrive, by time."""

    def __init__(
        self, plan: StepPlan, evaluations: Sequence[int], costs: TaskCosts, links: LinkCosts,
        orders: Optional[Sequence[Sequence[Message]]],
    ) -> None:  # fmt: skip
        self._plan, self._evaluations, self._costs, self._links = plan, evaluations, costs, links
        self._stages = [StageLogic(plan, stage) for stage in range(plan.stages)]
        self._orders = None if orders is None else [deque(order) for order in orders]
        self._free = [True] * plan.stages
        self._link_free: dict[tuple[int, int], float] = defaultdict(float)
        self._events: list[tuple[float, int, int, Optional[Message]]] = []
        """(time, number, stage, message that arrives; None: the stage's task ends)."""
        self._number = count()
        self._running: list[Optional[Message]] = [None] * plan.stages
        self._tasks: list[TaskRecord] = []

    def run(self) -> Timeline:
        """Until no event is left."""
        for stage in range(self._plan.stages):
            self._start(stage, 0.0)
        while self._events:
            now, _, stage, message = heapq.heappop(self._events)
            if message is None:
                self._end(stage, now)
            else:
                self._stages[stage].receive(message)
            self._start(stage, now)
        self._refuse_deadlock()
        return Timeline(self._plan, tuple(self._tasks))

    def _start(self, stage: int, now: float) -> None:
        if self._running[stage] is not None or (task := self._choose(stage)) is None:
            return
        self._stages[stage].begin(task)
        self._running[stage] = task
        end = now + self._costs.seconds(stage, task)
        self._tasks.append(TaskRecord(stage, *task, now, end))
        self._push(end, stage, None)

    def _choose(self, stage: int) -> Optional[Message]:
        logic = self._stages[stage]
        if self._orders is None:
            return None if logic.done else logic.choose()
        order = self._orders[stage]
        return order.popleft() if order and logic.can_begin(order[0]) else None

    def _end(self, stage: int, now: float) -> None:
        task, logic = self._running[stage], self._stages[stage]
        self._running[stage] = None
        send = logic.complete(task, self._decision(task) if logic.is_last and task.kind.forwards else None)
        if send is not None:
            self._push(self._arrival(stage, send, now), send.to, send.message)

    def _decision(self, task: Message) -> Step:
        """What the solve's state machine answers where a microbatch takes its given number of evaluations."""
        if task.kind is Kind.SOLVE:
            if task.evaluation + 1 < self._evaluations[task.microbatch]:
                return Step.SOLVE
            return Step.PHANTOM if self._plan.passes else Step.OUTPUT
        if task.kind is Kind.PHANTOM and task.evaluation + 1 < self._plan.passes:
            return Step.PHANTOM
        return Step.DONE

    def _arrival(self, stage: int, send: Send, now: float) -> float:
        """Messages of a directed link follow one another; computing goes on meanwhile."""
        link = self._links.link(stage, send.to)
        size = self._links.tensor_bytes * self._plan.tensors(send.message, send.to)
        key = (stage, send.to) if send.message.kind.forwards else (-1 - stage, send.to)
        self._link_free[key] = max(self._link_free[key], now) + size / link.bandwidth
        return self._link_free[key] + link.latency

    def _push(self, time: float, stage: int, message: Optional[Message]) -> None:
        heapq.heappush(self._events, (time, next(self._number), stage, message))

    def _refuse_deadlock(self) -> None:
        waiting = [logic.stage for logic in self._stages if not logic.done]
        if waiting:
            done = len(self._tasks)
            raise DeadlockError(f"after {done} tasks stages {waiting} wait for one another: {self._plan.limits}")

"""The stages' logic alone: random interleavings end, keep the limits, and give every stage the same backward order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from megatron_implicit.schedules import Kind, Limits, Message, ProtocolError, StageLogic, StepPlan
from megatron_implicit.solver import Step


@dataclass
class Run:
    """All stages of a step in one process; links deliver in order, after any time."""

    plan: StepPlan
    evaluations: list[int]
    random: random.Random
    tasks: list[list[Message]] = field(default_factory=list)
    """What each stage did."""
    solving: int = 0
    """The most that solved at once."""
    graphs: int = 0
    """The most microbatches that held graphs at once."""

    def decide(self, task: Message) -> Step:
        """What the solve says, given the evaluations each microbatch is to have."""
        if task.kind is Kind.OUTPUT or task.kind is Kind.PHANTOM and task.evaluation == self.plan.passes - 1:
            return Step.DONE
        if task.kind is Kind.PHANTOM:
            return Step.PHANTOM
        if task.evaluation + 1 < self.evaluations[task.microbatch]:
            return Step.SOLVE
        return Step.PHANTOM if self.plan.passes else Step.OUTPUT

    def run(self) -> "Run":
        """Lets a random stage take a step until all are done.

        Raises:
            AssertionError: nothing can happen any more and a stage is not done.
        """
        stages = [StageLogic(self.plan, stage) for stage in range(self.plan.stages)]
        links: dict[tuple[int, int, bool], list[Message]] = {}
        self.tasks = [[] for _ in stages]
        while not all(stage.done for stage in stages):
            able = [stage for stage in stages if stage.choose() is not None]
            full = [link for link, messages in links.items() if messages]
            assert able or full, f"deadlock: {self.plan} {self.evaluations}"
            if full and (not able or self.random.random() < 0.5):
                link = self.random.choice(full)
                stages[link[1]].receive(links[link].pop(0))
                continue
            logic = self.random.choice(able)
            task = logic.choose()
            assert logic.can_begin(task)
            logic.begin(task)
            self.tasks[logic.stage].append(task)
            self._note_limits()
            send = logic.complete(task, self.decide(task) if logic.is_last and task.kind.forwards else None)
            if send:
                links.setdefault((logic.stage, send.to, send.message.kind.forwards), []).append(send.message)
        assert not any(links.values())
        return self

    def _note_limits(self) -> None:
        first = self.tasks[0]
        begun = {task.microbatch for task in first if task.kind is Kind.PHANTOM}
        ended = {task.microbatch for task in first if task.kind is Kind.BACKWARD and task.evaluation == 0}
        self.graphs = max(self.graphs, len(begun - ended))
        admitted = {task.microbatch for task in first}
        self.solving = max(self.solving, len(admitted - begun - {t.microbatch for t in first if t.kind is Kind.OUTPUT}))


def random_plan(seed: int) -> tuple[StepPlan, list[int], random.Random]:
    """Any sizes, limits and evaluations."""
    choose = random.Random(seed)
    block = choose.choice([1, 2, 4])
    limits = Limits(choose.choice([1, 2, 4, 8]), block + choose.choice([0, 1, 4]), block)
    microbatches, passes = choose.choice([1, 3, 8]), choose.choice([0, 1, 2, 4])
    plan = StepPlan(
        choose.choice([2, 3, 4]), microbatches, passes, limits, unrolled=passes > 0 and choose.random() < 0.2
    )
    return plan, [choose.choice([1, 2, 5, 12]) for _ in range(microbatches)], choose


def test_any_interleaving_ends_with_everything_done() -> None:
    for seed in range(400):
        run = Run(*random_plan(seed)).run()
        plan = run.plan
        for tasks in run.tasks:
            assert [task for task in tasks if task.kind is Kind.BACKWARD] == list(plan.backward_order)
            for microbatch, evaluations in enumerate(run.evaluations):
                own = [task[::2] for task in tasks if task.microbatch == microbatch and task.kind.forwards]
                solve = [] if plan.unrolled else [(Kind.SOLVE, index) for index in range(evaluations)]
                output = [] if plan.passes else [(Kind.OUTPUT, 0)]
                assert own == solve + output + [(Kind.PHANTOM, index) for index in range(plan.passes)]
        assert run.graphs <= plan.limits.graphs
        assert plan.unrolled or run.solving <= plan.limits.in_flight


def test_the_backward_order_alternates_within_blocks() -> None:
    order = StepPlan(2, 3, 2, Limits(2, 2, 2)).backward_order
    assert [(task.microbatch, task.evaluation) for task in order] == [(0, 1), (1, 1), (0, 0), (1, 0), (2, 1), (2, 0)]


def test_the_embedding_and_its_gradient_travel_once() -> None:
    plan = StepPlan(3, 1, 2, Limits.default(3))
    first, later = Message(Kind.SOLVE, 0, 0), Message(Kind.SOLVE, 0, 1)
    assert [plan.tensors(first, receiver) for receiver in (1, 2)] == [2, 2]
    assert [plan.tensors(later, receiver) for receiver in (1, 2, 0)] == [1, 1, 1]
    last = Message(Kind.BACKWARD, 0, 0)
    assert [plan.tensors(last, stage) for stage in (2, 1, 0)] == [1, 2, 2]  # to the last stage it comes from stage 0


def test_limits_that_would_deadlock_are_refused() -> None:
    with pytest.raises(ValueError, match="block at most graphs"):
        Limits(solving=4, graphs=1, block=2)


@pytest.mark.parametrize(
    "stage, message",
    [
        (1, Message(Kind.SOLVE, 4, 0)),
        (0, Message(Kind.SOLVE, 0, 0)),
        (0, Message(Kind.BACKWARD, 0, 0)),
        (1, Message(Kind.PHANTOM, 0, 2)),
        (2, Message(Kind.BACKWARD, 0, 1)),
    ],
)
def test_an_impossible_message_is_refused_by_name(stage: int, message: Message) -> None:
    logic = StageLogic(StepPlan(3, 4, 2, Limits.default(3)), stage)
    with pytest.raises(ProtocolError, match=f"stage {stage} cannot get microbatch {message.microbatch}"):
        logic.receive(message)

"""The simulator runs the stages' own logic: no deadlock, limits kept, known bubbles, replays that change nothing."""

from __future__ import annotations

import json
import random
from collections import deque
from dataclasses import dataclass

import pytest

from megatron_implicit.schedules import Kind, Limits, Message, StageLogic, StepPlan, simulator
from megatron_implicit.schedules.costs import Link, LinkCosts, MeasuredCosts, PartCosts, StageCosts
from megatron_implicit.schedules.simulator import DeadlockError, replay, simulate
from megatron_implicit.schedules.timeline import Timeline, cut_into_steps, write_trace


@dataclass(frozen=True)
class AnyCosts:
    """Every task takes another time; now and then a long one."""

    random: random.Random

    def seconds(self, stage: int, task: Message) -> float:
        return self.random.expovariate(1.0) * (20.0 if self.random.random() < 0.05 else 1.0) + 1e-6


def _any_step(seed: int) -> tuple[Timeline, list[int]]:
    choose = random.Random(seed)
    block = choose.randint(1, 4)
    limits = Limits(choose.randint(1, 9), block + choose.randint(0, 4), block)
    passes, unrolled = choose.randint(0, 4), choose.random() < 0.1
    plan = StepPlan(choose.randint(2, 5), choose.randint(1, 12), max(passes, unrolled), limits, unrolled)
    evaluations = [choose.randint(1, 24) for _ in range(plan.microbatches)]
    links = LinkCosts(Link(choose.choice([0.0, 0.05, 3.0]), choose.choice([0.1, 1e9])), tensor_bytes=1.0)
    return simulate(plan, evaluations, AnyCosts(choose), links), [] if unrolled else evaluations


@pytest.mark.parametrize("block", range(4))
def test_any_costs_limits_and_evaluations_end_with_the_limits_kept(block: int) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        timeline, evaluations = _any_step(seed)
        plan, limits = timeline.plan, timeline.plan.limits
        assert not evaluations or timeline.evaluations == evaluations
        for stage in range(plan.stages):
            backward = [task for task in timeline.order(stage) if task.kind is Kind.BACKWARD]
            assert tuple(backward) == plan.backward_order
        assert timeline.most_at_once(Kind.SOLVE, Kind.SOLVE) <= limits.solving
        assert timeline.most_at_once(Kind.PHANTOM, Kind.BACKWARD) <= limits.graphs
        if plan.passes:
            assert timeline.most_at_once(Kind.SOLVE, Kind.BACKWARD) <= limits.in_flight


def test_a_schedule_that_cannot_go_on_is_reported() -> None:
    plan = StepPlan(2, 2, 1, Limits(2, 2, 1))
    orders = [list(simulate(plan, [1, 1], PartCosts.equal(plan)).order(stage)) for stage in range(2)]
    orders[1].reverse()
    with pytest.raises(DeadlockError, match=r"stages \[0, 1\] wait"):
        simulate(plan, [1, 1], PartCosts.equal(plan), orders=orders)


def test_one_microbatch_leaves_all_stages_but_one_idle() -> None:
    plan = StepPlan(4, 1, 1, Limits.default(4))
    timeline = simulate(plan, [4], PartCosts.equal(plan))
    assert timeline.bubble == pytest.approx(3 / 4)
    assert timeline.makespan == pytest.approx(4 * 4 + 4 + 4 * 2)


class BackwardFirst(StageLogic):
    """The schedule without its preference of the last stage."""

    def choose(self) -> Message | None:
        solves, self._solves = self._solves, self._solves if not self.is_last else deque()
        chosen = super().choose()
        self._solves = solves
        return chosen or (solves[0] if solves else None)


def test_bubbles_that_an_independent_simulator_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 microbatches of 4+1 passes, backward twice a forward, latency 0.05, every stage with the same priorities."""
    monkeypatch.setattr(simulator, "StageLogic", BackwardFirst)
    for stages, solving, bubble in [(2, 2, 0.095), (2, 4, 0.014), (4, 4, 0.150), (4, 16, 0.036), (8, 32, 0.066)]:
        plan = StepPlan(stages, 64, 1, Limits.default(stages, solving))
        timeline = simulate(plan, [4] * 64, PartCosts.equal(plan), LinkCosts(Link(0.05)))
        assert timeline.bubble == pytest.approx(bubble, abs=5e-4)


def test_solves_first_on_the_last_stage_halve_the_bubble_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of a fifth of the stack, on a last stage with fewer layers so that all have the same work."""
    plan = StepPlan(4, 64, 1, Limits.default(4))
    others, last = 4 / 4 + 0.8 * 3 / 7 / 4, 4 / 4 - 0.8 * 3 / 7 * 3 / 4
    judge = StageCosts(last, last, 2 * last, head=2.4)
    parts = [StageCosts(others, others, 2 * others)] * 3 + [judge]
    bubbles = []
    for logic in (StageLogic, BackwardFirst):
        monkeypatch.setattr(simulator, "StageLogic", logic)
        timeline = simulate(plan, [4] * 64, PartCosts(plan, parts), LinkCosts(Link(0.05)))
        assert timeline.imbalance == pytest.approx(0.0, abs=1e-9)
        bubbles.append(timeline.bubble)
    assert bubbles[0] < 0.06 < 0.12 < bubbles[1]


def test_a_replay_with_the_same_costs_changes_nothing() -> None:
    plan = StepPlan(3, 8, 2, Limits.default(3))
    choose = random.Random(0)
    original = simulate(plan, [choose.randint(1, 9) for _ in range(8)], PartCosts.equal(plan), LinkCosts(Link(0.1)))
    assert replay(original, MeasuredCosts(plan, original.tasks), LinkCosts(Link(0.1))) == original


def test_measured_costs_tell_injection_and_head_apart() -> None:
    plan = StepPlan(2, 6, 2, Limits.default(2))
    parts = [StageCosts(1, 2, 3, admission=0.5, admission_backward=0.25, judge=0.1, head=12)] * 2
    costs = PartCosts(plan, parts)
    measured = MeasuredCosts(plan, simulate(plan, [3] * 6, costs).tasks)
    for stage in range(2):
        for kind, evaluation in [(Kind.SOLVE, 0), (Kind.SOLVE, 2), (Kind.PHANTOM, 1), (Kind.BACKWARD, 0)]:
            task = Message(kind, 5, evaluation)
            assert measured.seconds(stage, task) == pytest.approx(costs.seconds(stage, task))


def test_recorded_steps_are_told_apart() -> None:
    plan = StepPlan(3, 5, 1, Limits.default(3))
    steps = [simulate(plan, [evaluations] * 5, PartCosts.equal(plan)) for evaluations in (2, 4, 3)]
    records = [task for stage in range(3) for step in steps for task in step.tasks if task.stage == stage]
    assert [step.evaluations for step in cut_into_steps(plan, records)] == [[2] * 5, [4] * 5, [3] * 5]


def test_the_trace_has_every_task_on_its_stages_track(tmp_path) -> None:
    plan = StepPlan(2, 3, 1, Limits.default(2))
    timeline = simulate(plan, [1, 2, 3], PartCosts.equal(plan))
    write_trace(tmp_path / "trace.json", {"recorded": timeline, "replayed": timeline})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tasks = [event for event in events if event["ph"] == "X"]
    assert len(tasks) == 2 * len(timeline.tasks)
    for track in {(event["pid"], event["tid"]) for event in tasks}:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in tasks if (e["pid"], e["tid"]) == track)
        assert all(earlier[1] <= later[0] for earlier, later in zip(spans, spans[1:]))

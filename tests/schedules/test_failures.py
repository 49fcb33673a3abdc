"""A stage that cannot go on ends all of them, and each says why: which stage and rank, which microbatch, which pass."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import Any

import pytest
import torch

from megatron_implicit.comm.leadership import Leadership
from megatron_implicit.comm.channel import GroupChannel, Header
from megatron_implicit.comm.ring import Direction, make_ring
from megatron_implicit.errors import NonFiniteIterateError, PipelineError
from megatron_implicit.schedules import Kind, Limits, Outcome, StageLogic, StepPlan
from megatron_implicit.schedules.driver import Driver
from megatron_implicit.schedules.tape import StageTape
from tests.distributed.harness import DistributedError, run_distributed
from tests.schedules.runs import run_on_threads, thread_errors
from tests.schedules.toy import Problem, ToyStage

LONG = pytest.mark.acceptance
PLAN = StepPlan(3, microbatches=4, passes=2, limits=Limits.default(3))


def problem(**changes: Any) -> Problem:
    """A problem whose solves take some evaluations."""
    settings = dataclasses.replace(Problem.random(0, 3).settings, max_iterations=6, tolerance=1e-4, gradient="phantom")
    return Problem(3, PLAN, dataclasses.replace(settings, phantom_steps=2), **changes)


def test_a_non_finite_iterate_ends_all_stages_with_its_place() -> None:
    settings = dataclasses.replace(problem().settings, accept="last")  # as an inference solve, which has no policy
    errors = thread_errors(dataclasses.replace(problem(broken=2), settings=settings))
    judge = errors.pop(2)
    assert isinstance(judge, NonFiniteIterateError)
    assert "pipeline stage 2 (rank 2), microbatch 2, evaluation 1" in str(judge)
    for stage, error in errors.items():
        assert isinstance(error, PipelineError)
        assert str(error).startswith(f"pipeline stage {stage} (rank {stage}) ends: pipeline stage 2 (rank 2) found a ")
        assert "microbatch 2, evaluation 1" in str(error)


def test_an_error_of_one_stage_ends_all_with_its_place() -> None:
    class Failing(ToyStage):
        def evaluate(self, h, u):
            if self.is_last:
                raise ZeroDivisionError("no")
            return super().evaluate(h, u)

    errors = thread_errors(problem(), model=Failing)
    assert isinstance(errors.pop(2), ZeroDivisionError)
    assert [str(errors[stage]) for stage in (0, 1)] == [
        f"pipeline stage {stage} (rank {stage}) ends: pipeline stage 2 (rank 2) failed in microbatch 0, evaluation 1: "
        "see its message"
        for stage in (0, 1)
    ]


@pytest.mark.parametrize(
    "header",
    [
        Header(0, 7, 0, Kind.SOLVE, 0, 2),
        Header(0, 0, 0, Kind.SOLVE, 0, 1),
        Header(0, 0, 0, Kind.BACKWARD, 0, 2),
        Header(0, 0, 99, Kind.SOLVE, 0, 2),
        Header(0, 0, 0, 77, 0, 2),
    ],
    ids=["number", "payload", "direction", "microbatch", "kind"],
)
def test_an_unexpected_header_ends_all_stages(header: Header) -> None:
    def forge(ring) -> None:
        ring.channel(0, 0).send(Direction.FORWARD, header, [])

    errors = thread_errors(problem(), before=forge)
    assert isinstance(errors[1], PipelineError) and "stage 1 cannot get" in str(errors[1])
    for stage in (0, 2):
        assert "pipeline stage 1 (rank 1) got a message that it did not expect" in str(errors[stage])


def test_sends_that_wait_for_their_receiver_deadlock_and_are_noticed() -> None:
    """The rendezvous channel can fail: a schedule that waits for its sends hangs on it."""
    plan = StepPlan(2, 8, 1, Limits(solving=8, graphs=2, block=1))
    with pytest.raises((RuntimeError, PipelineError)):
        run_on_threads(dataclasses.replace(problem(), plan=plan), blocking=True, timeout=1.0)


def test_nothing_sent_is_held_longer_than_it_must_be() -> None:
    plan = StepPlan(3, 30, 1, Limits(solving=2, graphs=2, block=1))
    settings = dataclasses.replace(problem().settings, phantom_steps=1, max_iterations=2)
    held = []
    run_on_threads(Problem(3, plan, settings), note_held=held.append)
    assert 0 < max(held) <= 3 * plan.limits.in_flight + 3


class Dying(StageTape):
    """A stage that is killed in the third evaluation of microbatch 1, or hangs there."""

    how = signal.SIGKILL

    def forward(self, task, tensors) -> Outcome:
        if task[:3] == (Kind.SOLVE, 1, 2):
            os.kill(os.getpid(), self.how)
        return super().forward(task, tensors)


def lose_a_stage(lost: int, how: int, timeout_s: float) -> float:
    """Runs a step in which a stage is lost; the seconds until this one ended."""
    ring = make_ring([[0, 1, 2]], [[0], [1], [2]], timeout_s / 60, host_payloads=True)
    case, tape = problem(), StageTape
    if ring.stage == lost:
        tape = Dying
        Dying.how = how
    driver = Driver(
        StageLogic(case.plan, ring.stage), tape(case.plan, ring.stage, ToyStage(case, ring.stage)),
        GroupChannel(ring, torch.device("cpu")), Leadership(ring.tensor_ranks, 3), ring.ranks, ring.timeout_s,
    )  # fmt: skip
    began = time.monotonic()
    try:
        driver.run()
    except PipelineError as error:
        raise PipelineError(f"{time.monotonic() - began:.1f} s: {error}") from None
    return 0.0


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=LONG), pytest.param(2, marks=LONG)])
def test_a_killed_stage_ends_the_others_at_once(lost: int) -> None:
    with pytest.raises(DistributedError) as failure:
        run_distributed(lose_a_stage, 3, lost, signal.SIGKILL, 60.0)
    assert "code -9" in failure.value.errors.pop(lost)
    assert len(failure.value.errors) == 2
    for stage, error in failure.value.errors.items():
        last = error.strip().splitlines()[-1]
        assert f"pipeline stage {stage} (rank {stage}) ends: pipeline stage {lost} (rank {lost}) is gone" in last
        assert "microbatch" in last and "evaluation" in last
        assert float(last.split("Error: ")[1].split()[0]) < 20, last


@pytest.mark.acceptance
def test_a_stage_that_hangs_ends_the_others_within_the_timeout() -> None:
    with pytest.raises(DistributedError) as failure:
        run_distributed(lose_a_stage, 3, 1, signal.SIGSTOP, 8.0, timeout=60)
    for stage in (0, 2):
        last = [line for line in failure.value.errors[stage].splitlines() if "PipelineError: " in line][-1]
        assert "heard nothing from the others within the timeout" in last and "microbatch" in last
        assert float(last.split("Error: ")[1].split()[0]) < 25, last

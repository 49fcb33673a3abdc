"""A toy problem by the schedule: stages as threads over the rendezvous channel, or as processes over Gloo."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Optional

import torch
import torch.distributed as dist

from megatron_implicit.comm.agreement import Leadership
from megatron_implicit.comm.channel import GroupChannel
from megatron_implicit.comm.ring import Ring, make_ring
from megatron_implicit.schedules import Outcome, StageLogic
from megatron_implicit.schedules.driver import Driver
from megatron_implicit.schedules.tape import StageTape
from tests.schedules.rendezvous import Rendezvous
from tests.schedules.toy import Problem, Result, ToyStage, combine, without_schedule


class Alone:
    """The leader of nobody."""

    leads = True

    def announce(self, choice: tuple[int, ...]) -> None:
        pass

    def announce_end(self, choice: tuple[int, ...]) -> None:
        pass


class Delayed(StageTape):
    """A stage whose tasks take a random time on top."""

    def __init__(self, *args: Any, delays: random.Random, slowest: float) -> None:
        super().__init__(*args)
        self._delays, self._slowest = delays, slowest

    def forward(self, *args: Any) -> Outcome:
        self._delay()
        return super().forward(*args)

    def backward(self, *args: Any) -> Outcome:
        self._delay()
        return super().backward(*args)

    def _delay(self) -> None:
        if self._slowest:
            time.sleep(self._delays.random() ** 3 * self._slowest)


def run_on_threads(problem: Problem, delay_seed: int = 0, slowest: float = 0.0, **options: Any) -> Result:
    """All stages in this process, a thread each.

    Raises:
        the first stage's error that another did not cause.
    """
    stages, ring = problem.plan.stages, Rendezvous(problem.plan.stages)
    parts: list[Any] = [None] * stages
    errors: dict[int, BaseException] = {}

    def work(stage: int) -> None:
        model = ToyStage(problem, stage)
        delays = random.Random(delay_seed * 7 + stage)
        tape = Delayed(problem.plan, stage, model, delays=delays, slowest=slowest)
        channel = ring.channel(stage, delay_seed, slowest=slowest, **options)
        driver = Driver(StageLogic(problem.plan, stage), tape, channel, Alone(), tuple(range(stages)), timeout_s=20.0)
        try:
            parts[stage] = driver.run(), model.gradients()
        except BaseException as error:
            errors[stage] = error

    threads = [threading.Thread(target=work, args=(stage,)) for stage in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return combine(parts)


def run_on_ring(ring: Ring, problem: Problem, delay_seed: int = 0, slowest: float = 0.0) -> Optional[Result]:
    """This process's stage; the first one gets the whole result."""
    model = ToyStage(problem, ring.stage)
    delays = random.Random(delay_seed * 7 + ring.stage)
    tape = Delayed(problem.plan, ring.stage, model, delays=delays, slowest=slowest)
    driver = Driver(
        StageLogic(problem.plan, ring.stage), tape, GroupChannel(ring, torch.device("cpu")),
        Leadership(ring.tensor_ranks, 3), ring.ranks, ring.timeout_s,
    )  # fmt: skip
    part = driver.run(), model.gradients()
    parts: list[Any] = [None] * ring.stages
    dist.gather_object(part, parts if ring.stage == 0 else None, dst=ring.ranks[0], group=ring.headers)
    return combine(parts) if ring.stage == 0 else None


def random_schedules(seeds: list[int], stages: int, slowest: float) -> list[str]:
    """Runs problems on the first ``stages`` processes under random delays; what went wrong, on the first one."""
    ring = make_ring([list(range(stages))], [[rank] for rank in range(dist.get_world_size())], 1.0, host_payloads=True)
    wrong = []
    for seed in seeds:
        problem = Problem.random(seed, stages)
        result = run_on_ring(ring, problem, delay_seed=seed, slowest=slowest) if ring else None
        if result is not None and not result.equals(without_schedule(problem)):
            wrong.append(str(problem))
    return wrong

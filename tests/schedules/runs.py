"""A toy problem by the schedule: stages as threads over the rendezvous channel, or as processes over Gloo."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import torch
import torch.distributed as dist

from megatron_implicit.comm.leadership import Leadership
from megatron_implicit.comm.channel import GroupChannel
from megatron_implicit.comm.ring import Ring, make_ring
from megatron_implicit.schedules import Outcome, StageLogic, TaskRecord
from megatron_implicit.schedules.driver import Driver
from megatron_implicit.schedules.tape import StageTape
from tests.schedules.rendezvous import Rendezvous, RendezvousChannel
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


@dataclass
class ThreadRun:
    """A step whose stages are threads of this process."""

    problem: Problem
    delay_seed: int = 0
    slowest: float = 0.0
    model: type[ToyStage] = ToyStage
    before: Optional[Callable[[Rendezvous], None]] = None
    """Does something to the links first."""
    note_held: Optional[Callable[[int], None]] = None
    """Gets the number of tensors a stage holds for its channel, after each of its tasks."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the channels."""
    parts: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)

    def run(self) -> "ThreadRun":
        """Runs all stages to their end."""
        ring = Rendezvous(self.problem.plan.stages)
        if self.before:
            self.before(ring)
        threads = [threading.Thread(target=self._work, args=(ring, stage)) for stage in range(ring.stages)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def _work(self, ring: Rendezvous, stage: int) -> None:
        problem, model = self.problem, self.model(self.problem, stage)
        delays = random.Random(self.delay_seed * 7 + stage)
        tape = Delayed(problem.plan, stage, model, delays=delays, slowest=self.slowest)
        channel = ring.channel(stage, self.delay_seed, slowest=self.slowest, **self.options)
        ranks = tuple(range(ring.stages))
        recorder = Held(channel, self.note_held) if self.note_held else None
        driver = Driver(StageLogic(problem.plan, stage), tape, channel, Alone(), ranks, 20.0, recorder)
        try:
            self.parts[stage] = driver.run(), model.gradients()
        except BaseException as error:
            self.errors[stage] = error


@dataclass
class Held:
    """A recorder that looks at the channel instead."""

    channel: RendezvousChannel
    note: Callable[[int], None]

    def record(self, task: TaskRecord) -> None:
        """After every task."""
        self.note(self.channel.held)


def run_on_threads(problem: Problem, delay_seed: int = 0, slowest: float = 0.0, note_held=None, **options) -> Result:
    """All stages in this process, a thread each.

    Raises:
        the error of the first stage that has one.
    """
    run = ThreadRun(problem, delay_seed, slowest, note_held=note_held, options=options).run()
    if run.errors:
        raise run.errors[min(run.errors)]
    return combine([run.parts[stage] for stage in range(problem.plan.stages)])


def thread_errors(problem: Problem, **options: Any) -> dict[int, BaseException]:
    """What each stage raised."""
    return ThreadRun(problem, **options).run().errors


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

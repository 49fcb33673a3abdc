"""GPUs never wait for each other in a circle, whatever the order in which their hosts see messages arrive.

The real driver runs in a thread for every rank of a pipeline with two tensor ranks a stage. A "GPU" is what each piece
of work that a host gives it waits for: the piece before it in its stream; a transfer of NCCL for both ends' streams as
they were when it was posted, and for the transfer before it on its link; a task for the other tensor rank, since every
task has a collective of the two. If that graph has a circle, GPUs of some speed would stand still for ever.
"""

from __future__ import annotations

import collections
import queue
import random
import threading
import time
from graphlib import CycleError, TopologicalSorter
from typing import Any, Hashable, NamedTuple, Optional, Sequence

import pytest
import torch
from torch import Tensor

from megatron_implicit.comm.channel import Arrival, Header, TensorSpec
from megatron_implicit.comm.ring import Direction
from megatron_implicit.schedules import Kind, Limits, Message, Outcome, StepPlan
from megatron_implicit.schedules.driver import Driver
from megatron_implicit.schedules.logic import StageLogic
from megatron_implicit.solver import Step

EVALUATIONS, PHANTOM_STEPS = 4, 1
TENSOR_RANKS = 2
TASK_S, LATE_S, LATE_SHARE = 0.003, 0.04, 0.01
"""What a host takes to give a task to its device, and how often it is late."""


class Devices:
    """What all ranks' devices have been given to do."""

    def __init__(self, stages: int, seed: int) -> None:
        self.stages, self._random, self._lock = stages, random.Random(seed), threading.Lock()
        self.waits: dict[Hashable, set[Hashable]] = collections.defaultdict(set)
        self._latest: dict[tuple[int, int], Hashable] = {}
        self._numbers: collections.Counter[Hashable] = collections.Counter()
        self.inboxes: dict[tuple[int, int], queue.Queue[Arrival]] = collections.defaultdict(queue.Queue)
        self.choices: dict[int, queue.Queue[tuple[int, ...]]] = collections.defaultdict(queue.Queue)

    def compute(self, rank: tuple[int, int], what: Hashable, *others: Hashable) -> None:
        """Puts something into a rank's stream, after everything that is there and after ``others``."""
        with self._lock:
            piece = (what, rank, self._number(rank))
            self.waits[piece].update(others, self._at(rank))
            self._latest[rank] = piece

    def collective(self, rank: tuple[int, int], what: Hashable) -> None:
        """Makes ``what`` wait for this rank's stream, and the stream for ``what``."""
        with self._lock:
            self.waits[what].update(self._at(rank))
        self.compute(rank, "after", what)

    def transfer(self, end: str, link: Hashable, rank: tuple[int, int]) -> Hashable:
        """Posts one end of the link's next transfer."""
        with self._lock:
            number = self._number((end, link))
            self.waits[link, number].update(self._at(rank), [(link, number - 1)] if number else [])
        return link, number

    def host_works(self) -> None:
        """Takes the time that a host needs for a task."""
        with self._lock:
            late = self._random.random() < LATE_SHARE
            seconds = TASK_S * self._random.uniform(0.8, 1.2) + (LATE_S if late else 0.0)
        time.sleep(seconds)

    def _at(self, rank: tuple[int, int]) -> list[Hashable]:
        return [self._latest[rank]] if rank in self._latest else []

    def _number(self, what: Hashable) -> int:
        self._numbers[what] += 1
        return self._numbers[what] - 1


class Incoming(NamedTuple):
    """A payload of NCCL."""

    devices: Devices
    rank: tuple[int, int]
    transfers: list[Hashable]

    def wait(self) -> list[Tensor]:
        for transfer in self.transfers:
            self.devices.compute(self.rank, "received", transfer)
        return [torch.zeros(1) for _ in self.transfers]


class Links:
    """``Channel`` of one rank."""

    def __init__(self, devices: Devices, stage: int, tensor_rank: int) -> None:
        self._devices, self._stage, self._rank = devices, stage, (stage, tensor_rank)
        self._sent: dict[Direction, collections.deque] = {direction: collections.deque() for direction in Direction}

    def open(self) -> None:
        pass

    def send(self, direction: Direction, header: Header, tensors: Sequence[Tensor]) -> None:
        for _ in tensors:
            transfer = self._devices.transfer("send", (direction, self._rank), self._rank)
            self._sent[direction].append((header.microbatch, transfer))
        receiver = direction.receiver(self._stage, self._devices.stages)
        self._devices.inboxes[receiver, self._rank[1]].put(Arrival(direction, header))

    def arrival(self, timeout: float) -> Optional[Arrival]:
        try:
            return self._devices.inboxes[self._rank].get(block=timeout > 0, timeout=timeout or None)
        except queue.Empty:
            return None

    def payload(self, direction: Direction, specs: Sequence[TensorSpec]) -> Incoming:
        link = (direction, (direction.sender(self._stage, self._devices.stages), self._rank[1]))
        transfers = [self._devices.transfer("receive", link, self._rank) for _ in specs]
        return Incoming(self._devices, self._rank, transfers)

    def received(self, direction: Direction, microbatch: int) -> None:
        sent = self._sent[direction]
        for _ in range(max((place for place, entry in enumerate(sent, 1) if entry[0] == microbatch), default=0)):
            self._devices.compute(self._rank, "sent", sent.popleft()[1])

    def close(self, farewell: Header) -> None:
        pass

    def abandon(self, farewell: Header) -> None:
        pass


class Choices:
    """``Leader`` of one of two tensor ranks."""

    def __init__(self, devices: Devices, stage: int, tensor_rank: int) -> None:
        self._choices, self.leads = devices.choices[stage], tensor_rank == 0

    def announce(self, choice: tuple[int, ...]) -> None:
        self._choices.put(choice)

    def learn(self) -> tuple[int, ...]:
        return self._choices.get(timeout=20)

    def announce_end(self, choice: tuple[int, ...]) -> None:
        self._choices.put(choice)


class Work:
    """``StageCompute`` whose tasks are a collective of the stage's tensor ranks."""

    iterate = embedding = embedding_gradient = TensorSpec((1,), torch.float32)

    def __init__(self, devices: Devices, plan: StepPlan, stage: int, tensor_rank: int) -> None:
        self._devices, self._plan, self._stage, self._rank = devices, plan, stage, (stage, tensor_rank)

    def admit(self, microbatch: int) -> list[Tensor]:
        return [torch.zeros(1)] * 2

    def forward(self, task: Message, tensors: list[Tensor]) -> Outcome:
        self._run(task)
        last = self._stage == self._plan.stages - 1
        with_embedding = self._plan.admits(task) and not last
        return Outcome([torch.zeros(1)] * (2 if with_embedding else 1), self._next(task) if last else None)

    def backward(self, task: Message, tensors: list[Tensor]) -> Outcome:
        self._run(task)
        if task.evaluation:
            return Outcome([torch.zeros(1)])
        return Outcome([] if self._stage == 0 else [torch.zeros(1)] * 2)

    def finish(self) -> list[Any]:
        return []

    def _next(self, task: Message) -> Step:
        if task.kind is Kind.SOLVE:
            return Step.SOLVE if task.evaluation + 1 < EVALUATIONS else Step.PHANTOM
        return Step.PHANTOM if task.evaluation + 1 < PHANTOM_STEPS else Step.DONE

    def _run(self, task: Message) -> None:
        self._devices.host_works()
        self._devices.collective(self._rank, (self._stage, task))


def run_step(stages: int, seed: int) -> Devices:
    """One step of all ranks."""
    devices, errors = Devices(stages, seed), []
    plan = StepPlan(stages, 16, PHANTOM_STEPS, Limits.default(stages))

    def run(stage: int, tensor_rank: int) -> None:
        where = (stage, tensor_rank)
        work = Work(devices, plan, *where)
        driver = Driver(
            StageLogic(plan, stage), work, Links(devices, *where), Choices(devices, *where), tuple(range(stages)), 20.0
        )
        try:
            driver.run()
        except Exception as error:
            errors.append((where, error))

    for stage in range(stages):
        devices.choices[stage] = queue.Queue()
        for tensor_rank in range(TENSOR_RANKS):
            devices.inboxes[stage, tensor_rank] = queue.Queue()
    threads = [
        threading.Thread(target=run, args=(stage, rank)) for stage in range(stages) for rank in range(TENSOR_RANKS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return devices


@pytest.mark.parametrize("seed", range(2))
def test_devices_never_wait_in_a_circle(seed: int) -> None:
    devices = run_step(4, seed)
    assert len(devices.waits) > 1000
    try:
        TopologicalSorter(devices.waits).prepare()
    except CycleError as error:
        pytest.fail(f"devices wait in a circle: {error.args[1]}")

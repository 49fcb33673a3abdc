"""Runs one stage of one step: what has arrived, what comes next, compute it, send what follows."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, Callable, NoReturn, Optional, Protocol

from torch import Tensor

from megatron_implicit.comm.channel import Arrival, Channel, Header, Payload, TensorSpec
from megatron_implicit.comm.ring import Direction
from megatron_implicit.device import current_platform
from megatron_implicit.errors import NonFiniteIterateError
from megatron_implicit.schedules.compute import StageCompute
from megatron_implicit.schedules.farewell import Farewell, Reason
from megatron_implicit.schedules.logic import Send, StageLogic
from megatron_implicit.schedules.protocol import Kind, Message, ProtocolError
from megatron_implicit.schedules.recording import Recorder, TaskRecord
from megatron_implicit.telemetry.timing import switch_to, timed_as


_PARTS = {Kind.SOLVE: "solve", Kind.OUTPUT: "solve", Kind.PHANTOM: "phantom", Kind.BACKWARD: "backward"}
"""Parts of a step's time by kind of task."""


class Leader(Protocol):
    """How the ranks that share a stage choose alike; see ``comm.leadership.Leadership``."""

    leads: bool

    def announce(self, choice: tuple[int, ...]) -> None:
        """The leader tells what it does next."""

    def learn(self) -> tuple[int, ...]:
        """A follower waits for that."""

    def announce_end(self, choice: tuple[int, ...]) -> None:
        """A last choice, as well as it goes."""


class Driver:
    """One stage of one step.

    Args:
        logic: what to do next.
        compute: how.
        channel: this stage's links.
        leader: how the ranks of this stage choose alike.
        ranks: global ranks by stage, for messages.
        timeout_s: seconds without a message after which the others are given up.
        recorder: gets every task.
        alive: told of every task that begins.
    """

    def __init__(
        self, logic: StageLogic, compute: StageCompute, channel: Channel, leader: Leader, ranks: tuple[int, ...],
        timeout_s: float, recorder: Optional[Recorder] = None, alive: Callable[[str], None] = lambda where: None,
    ) -> None:  # fmt: skip
        self._logic, self._compute, self._channel, self._leader = logic, compute, channel, leader
        self._plan, self._stage, self._ranks, self._timeout_s = logic.plan, logic.stage, ranks, timeout_s
        self._recorder, self._alive = recorder, alive
        self._payloads: dict[Message, Payload] = {}
        self._sent: dict[Direction, int] = defaultdict(int)
        self._arrived: dict[Direction, int] = defaultdict(int)
        self._latest: Optional[Message] = None  # for messages: the last task, or what arrived for the next

    def run(self) -> list[Any]:
        """Works until nothing is left; returns the reports of ``StageCompute.finish``.

        Raises:
            PipelineError: another stage gave up, died, or sent what cannot be; names ranks, microbatch, evaluation.
            NonFiniteIterateError: this is the last stage, and an iterate is not finite; names the microbatch.
        """
        self._channel.open()
        try:
            while not self._logic.done:
                self._take_arrivals()
                task = self._next_task()
                if task is None:
                    self._wait_for_arrival()
                else:
                    self._run_task(task)
            switch_to("backward")
            reports = self._compute.finish()
            self._channel.close(Header(1, 0, 0, Kind.STOP, 0, 0))
            return reports
        except BaseException as error:
            self._give_up(error)

    def _next_task(self) -> Optional[Message]:
        """The leader's choice; a follower waits for it, and then for its own copy of what it needs."""
        if self._leader.leads:
            task = self._logic.choose()
            if task is not None:
                self._leader.announce(tuple(task))
            return task
        kind, microbatch, evaluation = self._leader.learn()
        task = Message(Kind(kind), microbatch, evaluation)
        if task.kind is Kind.ABORT:
            raise Farewell(Reason.LED, self._stage, task=self._latest)
        while not self._logic.can_begin(task):
            self._wait_for_arrival()
        return task

    def _run_task(self, task: Message) -> None:
        self._latest = task
        switch_to(_PARTS[task.kind])
        self._alive(str(task))
        tensors = self._await_payload(task)
        start = self._device_time()
        self._logic.begin(task)
        if self._logic.is_first and self._plan.admits(task):
            tensors = self._compute.admit(task.microbatch)
        compute = self._compute.forward if task.kind.forwards else self._compute.backward
        outcome = compute(task, tensors)
        send = self._logic.complete(task, outcome.step)
        if self._recorder is not None:  # before a send, which may wait for its peer
            self._recorder.record(TaskRecord(self._stage, *task, start, self._device_time()))
        if send is not None:
            self._send(send, outcome.tensors)

    def _device_time(self) -> float:
        """Now, once the device has done what it was given, if tasks are recorded."""
        if self._recorder is not None:
            current_platform().synchronize_stream()
        return time.perf_counter()

    def _await_payload(self, task: Message) -> list[Tensor]:
        """Waits for what a task begins with, and for the sends that its beginning proves to have arrived.

        A GPU waits for transfers in the order in which it is told to, and the ranks of a stage may see messages arrive
        in different orders. They are waited for here and not on arrival, so that this order is that of the tasks, which
        is the same on all of them: otherwise each of two ranks may wait for what another stage sends only after a task
        with a collective that both must have come to.
        """
        tensors: list[Tensor] = []
        if task in self._payloads:
            with timed_as("communication"):
                tensors = self._payloads.pop(task).wait()
            self._channel.received(_direction(task), task.microbatch)  # what was sent before it came round
        if self._plan.admits(task):
            self._settle_before(task.microbatch)
        return tensors

    # ---------------------------------------------------------------- messages

    def _send(self, send: Send, tensors: list[Tensor]) -> None:
        message, receiver = send
        ready = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if ready != self._specs(message, receiver):  # a transfer of another size would go wrong without a word
            raise ProtocolError(f"stage {self._stage} has {ready} to send for {message}, not what is awaited")
        direction = _direction(message)
        header = Header(
            0, self._sent[direction], message.microbatch, message.kind, message.evaluation, len(tensors)
        )
        self._sent[direction] += 1
        self._channel.send(direction, header, tensors)

    def _take_arrivals(self) -> None:
        while (arrival := self._channel.arrival(0.0)) is not None:
            self._take(arrival)

    def _wait_for_arrival(self) -> None:
        with timed_as("communication"):  # with the schedule's bubble in it
            arrival = self._channel.arrival(self._timeout_s)
        if arrival is None:
            raise Farewell(Reason.SILENT, self._stage, task=self._latest)
        self._take(arrival)

    def _take(self, arrival: Arrival) -> None:
        """Receives a message, and begins to receive its payload, at once and in the order of headers."""
        direction, header, error = arrival
        sender = direction.sender(self._stage, self._plan.stages)
        if header is None:
            raise Farewell(Reason.GONE, sender, task=self._latest) from error
        if header.kind == Kind.ABORT:
            raise Farewell.of(header)
        message = self._check(direction, header, sender)
        self._logic.receive(message)
        self._payloads[message] = self._channel.payload(direction, self._specs(message, self._stage))
        self._latest = message

    def _check(self, direction: Direction, header: Header, sender: int) -> Message:
        expected = self._arrived[direction]
        self._arrived[direction] += 1
        known = header.kind in (Kind.SOLVE, Kind.OUTPUT, Kind.PHANTOM, Kind.BACKWARD)
        message = Message(Kind(header.kind), header.microbatch, header.evaluation) if known else None
        if (
            message is None
            or header.number != expected
            or _direction(message) is not direction
            or header.tensors != self._plan.tensors(message, self._stage)
        ):
            raise ProtocolError(
                f"stage {self._stage} cannot get {tuple(header)} as message {expected} from stage {sender}: the stages "
                "have lost each other"
            )
        return message

    def _specs(self, message: Message, receiver: int) -> list[TensorSpec]:
        compute = self._compute
        second = compute.embedding if message.kind.forwards else compute.embedding_gradient
        return [compute.iterate, second][: self._plan.tensors(message, receiver)]

    def _settle_before(self, admitted: int) -> None:
        """An admission tells that as many microbatches before it as are not in flight have ended on all stages."""
        ended = admitted - self._plan.limits.in_flight
        if ended >= 0 and self._plan.passes:  # in an inference solve they end in any order
            for direction in Direction:
                self._channel.received(direction, ended)

    # ---------------------------------------------------------------- the end, if it goes wrong

    def _give_up(self, error: BaseException) -> NoReturn:
        """Tells both neighbours and the followers, and raises what the user should read."""
        farewell = Farewell.explaining(error, self._channel, self._stage, self._plan.stages, self._latest)
        self._channel.abandon(farewell.header())
        self._leader.announce_end((Kind.ABORT, 0, 0))
        if isinstance(error, NonFiniteIterateError):
            raise error.at(microbatch=self._latest.microbatch, stage=farewell.place(self._stage, self._ranks)) from None
        if farewell.is_own_failure:
            raise error
        raise farewell.as_error(self._stage, self._ranks) from error


def _direction(message: Message) -> Direction:
    return Direction.FORWARD if message.kind.forwards else Direction.BACKWARD

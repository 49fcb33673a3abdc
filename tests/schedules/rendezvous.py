"""A channel between threads on which a send returns only when its receive is posted, as NCCL's kernels do.

Every link runs its transfers in order. ``send`` puts a transfer on its link and comes back (NCCL enqueues); the handle
is waited for when the schedule says that the message has arrived, and that wait ends only once the receiver has posted
its receive. The buffer is read then, not before: one that changed in between arrives changed. ``blocking`` makes
``send`` itself wait, which is what a schedule must never depend on.
"""

from __future__ import annotations

import collections
import queue
import random
import threading
import time
from typing import NamedTuple, Optional, Sequence

from torch import Tensor

from megatron_implicit.comm.channel import Arrival, Header, TensorSpec
from megatron_implicit.comm.ring import Direction


class Link:
    """One directed link: transfers in order, each completed by its receiver."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[tuple[Tensor, threading.Event]] = queue.SimpleQueue()

    def put(self, tensor: Tensor) -> threading.Event:
        """Enqueues a transfer."""
        received = threading.Event()
        self.waiting.put((tensor, received))
        return received

    def take(self, spec: TensorSpec, timeout: float) -> Tensor:
        """Posts a receive."""
        tensor, received = self.waiting.get(timeout=timeout)
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(spec.shape), spec.dtype)
        copy = tensor.clone()
        received.set()
        return copy


class Rendezvous:
    """The links of a ring of threads."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.links = {(direction, sender): Link() for direction in Direction for sender in range(stages)}
        self.inboxes = [queue.SimpleQueue() for _ in range(stages)]

    def channel(self, stage: int, seed: int, **options) -> "RendezvousChannel":
        """The ends of one stage."""
        return RendezvousChannel(self, stage, random.Random(seed * 31 + stage), **options)


class Received(NamedTuple):
    """A payload that is there."""

    tensors: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.tensors


class RendezvousChannel:
    """``Channel`` of one thread."""

    def __init__(
        self, ring: Rendezvous, stage: int, delays: random.Random, *, slowest: float = 0.0, blocking: bool = False,
        timeout: float = 20.0,
    ) -> None:  # fmt: skip
        self._ring, self._stage, self._delays, self._slowest = ring, stage, delays, slowest
        self._blocking, self._timeout = blocking, timeout
        self._sent = {direction: collections.deque() for direction in Direction}

    def open(self) -> None:
        pass

    def send(self, direction: Direction, header: Header, tensors: Sequence[Tensor]) -> None:
        link = self._ring.links[direction, self._stage]
        for tensor in tensors:
            received = link.put(tensor.detach())
            self._sent[direction].append((header.microbatch, received))
            if self._blocking:
                self._wait(received)
        self._send_header(direction, header)

    def arrival(self, timeout: float) -> Optional[Arrival]:
        if self._slowest:
            time.sleep(self._delays.random() ** 3 * self._slowest)
        try:
            return self._ring.inboxes[self._stage].get(block=timeout > 0, timeout=timeout or None)
        except queue.Empty:
            return None

    def payload(self, direction: Direction, specs: Sequence[TensorSpec]) -> "Received":
        link = self._ring.links[direction, direction.sender(self._stage, self._ring.stages)]
        return Received([link.take(spec, self._timeout) for spec in specs])

    def received(self, direction: Direction, microbatch: int) -> None:
        sent = self._sent[direction]
        for _ in range(max((place for place, entry in enumerate(sent, 1) if entry[0] == microbatch), default=0)):
            self._wait(sent.popleft()[1])

    def close(self, farewell: Header) -> None:
        for direction in Direction:
            for _, received in self._sent[direction]:
                self._wait(received)

    def abandon(self, farewell: Header) -> None:
        for direction in Direction:
            self._send_header(direction, farewell)

    @property
    def held(self) -> int:
        """Tensors that may not be let go of yet."""
        return sum(len(sent) for sent in self._sent.values())

    def _send_header(self, direction: Direction, header: Header) -> None:
        inbox = self._ring.inboxes[direction.receiver(self._stage, self._ring.stages)]
        inbox.put(Arrival(direction, header))

    def _wait(self, received: threading.Event) -> None:
        if not received.wait(self._timeout):
            raise RuntimeError("a send was never received")

"""Messages between neighbouring stages of a ring: a header on the CPU, and its payload on the data groups.

The payload is sent first, then its header; the n-th header of a link belongs to its n-th payload. A thread for each
direction always has a receive of a header posted; the main thread posts receives of payloads in the order of headers,
and waits for a payload when it computes with it. Gloo's sends are unbuffered: a tensor may not change, nor its handle be
dropped, before the other end has received it, and a handle cannot be polled, hence threads, and hence no waiting for a
send but for one that is known to have arrived: a microbatch that comes round again proves it for everything sent before
on that link.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import queue
import threading
from typing import Any, NamedTuple, Optional, Protocol, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.comm.leadership import FAREWELL_S
from megatron_implicit.comm.ring import Direction, Ring

HEADERS_KEPT = 16
"""Headers whose handles are kept: a header is received at once, so older ones have arrived."""

AS_LONG_AS_IT_TAKES = datetime.timedelta(days=30)
"""A direction may be quiet for a whole step (an evaluation sends nothing backwards): whoever waits for anything at all
has a timeout, the thread that listens has none. A neighbour that dies ends its receive at once."""


class Header(NamedTuple):
    """What a message says about itself, as int64 on the wire. The channel reads ``last`` and ``microbatch``."""

    last: int
    """1: the sender has nothing more to send in this step."""
    number: int
    """Message of this link and step, counted from 0."""
    microbatch: int
    kind: int
    evaluation: int
    tensors: int
    """Tensors in the payload."""
    about: int = 0
    """The stage that is to blame, where the sender gives up."""
    reason: int = 0
    """Why it gives up."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Arrival(NamedTuple):
    """A header that has arrived, or why none will."""

    direction: Direction
    header: Optional[Header]
    error: Optional[BaseException] = None


class Payload(Protocol):
    """Tensors that are being received."""

    def wait(self) -> list[Tensor]:
        """The tensors. Over NCCL it is the device that waits: what it is given to do from here on comes after them."""


class Channel(Protocol):
    """One process's ends of its ring's links."""

    def open(self) -> None:
        """Begins a step: from here on headers are received."""

    def send(self, direction: Direction, header: Header, tensors: Sequence[Tensor]) -> None:
        """Sends a payload and its header; returns when they are under way. The tensors must not change any more."""

    def arrival(self, timeout: float) -> Optional[Arrival]:
        """The oldest header not yet asked for; None if there is none within ``timeout`` seconds."""

    def payload(self, direction: Direction, specs: Sequence[TensorSpec]) -> Payload:
        """Begins to receive the payload of a header; must be called for every header, in their order."""

    def received(self, direction: Direction, microbatch: int) -> None:
        """The schedule knows that everything sent up to the last message of this microbatch has been received."""

    def close(self, farewell: Header) -> None:
        """Ends a step both ways; returns when everything has been received."""

    def abandon(self, farewell: Header) -> None:
        """Sends a last header both ways, as well as it goes."""


class _Receives(NamedTuple):
    """A ``Payload``: where it arrives, how to wait for it, and where it is computed with."""

    tensors: list[Tensor]
    works: list[Any]
    device: torch.device

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return [tensor.to(self.device, non_blocking=True) for tensor in self.tensors]


class GroupChannel:
    """A channel over torch.distributed: headers over Gloo; payloads over NCCL, over Gloo, or staged through the host.

    Args:
        ring: the groups.
        device: where tensors live.
    """

    def __init__(self, ring: Ring, device: torch.device) -> None:
        self._ring, self._device = ring, device
        self._staged = device.type != "cpu" and dist.get_backend(ring.outgoing(Direction.FORWARD)) == "gloo"
        self._inbox: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._headers: collections.deque[tuple[Any, Tensor]] = collections.deque()
        self._sent = {direction: collections.deque() for direction in Direction}
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        self._threads = [
            threading.Thread(target=self._receive_headers, args=(direction,), daemon=True) for direction in Direction
        ]
        for thread in self._threads:
            thread.start()

    def send(self, direction: Direction, header: Header, tensors: Sequence[Tensor]) -> None:
        receiver, group = self._ring.ranks[self._ring.receiver(direction)], self._ring.outgoing(direction)
        for tensor in tensors:
            buffer = self._outgoing(tensor)
            self._sent[direction].append((header.microbatch, dist.isend(buffer, receiver, group=group), buffer))
        self._send_header(direction, header)

    def arrival(self, timeout: float) -> Optional[Arrival]:
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(block=timeout > 0.0, timeout=timeout or None)
        return None

    def payload(self, direction: Direction, specs: Sequence[TensorSpec]) -> Payload:
        sender, group = self._ring.ranks[self._ring.sender(direction)], self._ring.incoming(direction)
        place = dict(device="cpu", pin_memory=True) if self._staged else dict(device=self._device)
        tensors = [torch.empty(spec.shape, dtype=spec.dtype, **place) for spec in specs]
        return _Receives(tensors, [dist.irecv(tensor, sender, group=group) for tensor in tensors], self._device)

    def received(self, direction: Direction, microbatch: int) -> None:
        sent = self._sent[direction]
        places = (place for place, entry in enumerate(sent, 1) if entry[0] == microbatch)
        self._settle(direction, max(places, default=0))

    def close(self, farewell: Header) -> None:
        for direction in Direction:
            self._send_header(direction, farewell)
        for direction in Direction:
            self._settle(direction, len(self._sent[direction]))
        self._settle_headers(keep=0)
        for thread in self._threads:
            thread.join(self._ring.timeout_s)
            if thread.is_alive():
                raise TimeoutError("a neighbouring stage has not ended the step within the timeout")

    def abandon(self, farewell: Header) -> None:
        with contextlib.suppress(RuntimeError):  # a neighbour may be gone
            for direction in Direction:
                self._send_header(direction, farewell)
        waiting = threading.Thread(target=self._settle_headers, args=(0,), daemon=True)
        waiting.start()
        waiting.join(FAREWELL_S)

    # ---------------------------------------------------------------- its parts

    def _outgoing(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor) if self._staged else tensor

    def _settle(self, direction: Direction, tensors: int) -> None:
        """Lets go of the oldest tensors sent on a link."""
        for _ in range(tensors):
            self._sent[direction].popleft()[1].wait()

    def _settle_headers(self, keep: int) -> None:
        with contextlib.suppress(RuntimeError):  # a lost neighbour is noticed by the thread that listens to it
            while len(self._headers) > keep:
                self._headers.popleft()[0].wait()

    def _send_header(self, direction: Direction, header: Header) -> None:
        buffer = torch.tensor(header, dtype=torch.int64)
        receiver = self._ring.ranks[self._ring.receiver(direction)]
        self._headers.append((dist.isend(buffer, receiver, group=self._ring.headers, tag=int(direction)), buffer))
        self._settle_headers(keep=HEADERS_KEPT)

    def _receive_headers(self, direction: Direction) -> None:
        sender = self._ring.ranks[self._ring.sender(direction)]
        try:
            while True:
                buffer = torch.empty(len(Header._fields), dtype=torch.int64)
                receive = dist.irecv(buffer, sender, group=self._ring.headers, tag=int(direction))
                receive.wait(AS_LONG_AS_IT_TAKES)
                header = Header(*buffer.tolist())
                if header.last:
                    return
                self._inbox.put(Arrival(direction, header))
        except Exception as error:  # the main thread is the only one that can act on it
            self._inbox.put(Arrival(direction, None, error))

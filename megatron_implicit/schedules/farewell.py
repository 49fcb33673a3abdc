"""Why a stage gives up, told to the others so that every rank ends with the same reason."""

from __future__ import annotations

import enum
from typing import Optional

from megatron_implicit.comm.channel import Channel, Header
from megatron_implicit.comm.failures import is_lost_peer
from megatron_implicit.errors import MegatronImplicitError, NonFiniteIterateError, PipelineError
from megatron_implicit.schedules.protocol import Kind, Message, ProtocolError

EXPLANATION_S = 2.0
"""A neighbour that is gone may have said why: what is waited for its last words."""


class Reason(enum.IntEnum):
    """What happened on the stage that is to blame. The values are on the wire."""

    GONE = 0
    SILENT = 1
    NON_FINITE = 2
    DESYNCHRONISED = 3
    FAILED = 4
    LED = 5
    COLLECTIVE = 6


_WORDS = {
    Reason.GONE: "{place} is gone; the last known of it: {task}. Start the job again: it goes on from its checkpoint",
    Reason.SILENT: "{place} heard nothing from the others within the timeout; its last: {task}. Raise "
    "parallel.timeout_minutes if a step may take as long",
    Reason.NON_FINITE: "{place} found a non-finite iterate in {task}: see its message",
    Reason.DESYNCHRONISED: "{place} got a message that it did not expect; its last: {task}. Report this, with the logs "
    "of all ranks",
    Reason.FAILED: "{place} failed in {task}: see its message",
    Reason.LED: "{place} ends with the first of its tensor-parallel ranks, in {task}: see that rank's message",
    Reason.COLLECTIVE: "{place} lost a rank that it computes with, in {task}. Start the job again: it goes on from its "
    "checkpoint",
}


class Farewell(Exception):
    """A stage's last words, its own or passed on.

    Args:
        reason: what happened.
        about: on which stage.
        task: what that stage was doing, as far as is known; None before its first task.
    """

    def __init__(self, reason: Reason, about: int, task: Optional[Message]) -> None:
        super().__init__(reason, about, task)
        self.reason, self.about, self.task = reason, about, task
        self.is_own_failure = False

    @classmethod
    def of(cls, header: Header) -> "Farewell":
        """From an ABORT header."""
        kind = header.tensors - 1  # an ABORT has no payload: the field says what kind of task it was
        task = Message(Kind(kind), header.microbatch, header.evaluation) if kind >= 0 else None
        return cls(Reason(header.reason), header.about, task)

    def header(self) -> Header:
        """The ABORT header."""
        kind, microbatch, evaluation = self.task or (-1, 0, 0)
        return Header(0, 0, microbatch, Kind.ABORT, evaluation, kind + 1, self.about, self.reason)

    @classmethod
    def explaining(
        cls, error: BaseException, channel: Channel, stage: int, stages: int, task: Optional[Message]
    ) -> "Farewell":
        """The reason behind an error; where a transfer failed, a neighbour may have told, or be gone."""
        if isinstance(error, NonFiniteIterateError):
            return cls(Reason.NON_FINITE, stage, task)
        if isinstance(error, Farewell) and error.reason not in (Reason.GONE, Reason.LED):
            return error
        told = None if isinstance(error, MegatronImplicitError) else cls._last_words(channel, stage, stages, task)
        if told is not None:
            return told
        if isinstance(error, Farewell):
            return error
        if isinstance(error, TimeoutError):
            return cls(Reason.SILENT, stage, task)
        if is_lost_peer(error):
            return cls(Reason.COLLECTIVE, stage, task)
        farewell = cls(Reason.DESYNCHRONISED if isinstance(error, ProtocolError) else Reason.FAILED, stage, task)
        farewell.is_own_failure = True
        return farewell

    @classmethod
    def _last_words(cls, channel: Channel, stage: int, stages: int, task: Optional[Message]) -> Optional["Farewell"]:
        """What a neighbour says, if any does, else that it is gone, if it is."""
        gone = None
        while (arrival := channel.arrival(EXPLANATION_S)) is not None:
            if arrival.header is not None and arrival.header.kind == Kind.ABORT:
                return cls.of(arrival.header)
            if arrival.header is None:
                gone = cls(Reason.GONE, arrival.direction.sender(stage, stages), task)
        return gone

    @staticmethod
    def place(stage: int, ranks: tuple[int, ...]) -> str:
        """A stage, for a message."""
        return f"pipeline stage {stage} (rank {ranks[stage]})"

    def as_error(self, stage: int, ranks: tuple[int, ...]) -> PipelineError:
        """What the user of this stage reads."""
        task = str(self.task) if self.task is not None else "nothing yet"
        what = _WORDS[self.reason].format(place=self.place(self.about, ranks), task=task)
        here = "" if stage == self.about else f"{self.place(stage, ranks)} ends: "
        return PipelineError(here + what, restart=self.reason is not Reason.NON_FINITE)

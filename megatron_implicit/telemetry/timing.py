"""What a step's time goes to, on this rank, without ever waiting for the device.

The clock is switched from part to part, as a stopwatch with several dials: the parts add up to the step. On a GPU a
switch records an event in the stream, and the events are read when they have happened, by a thread that may wait.
Code that computes a step calls ``switch_to``; outside a step, and where nobody keeps time, that does nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Optional

from megatron_implicit.device import Platform, current_platform

PARTS = ("data_wait", "forward", "solve", "phantom", "backward", "optimizer", "communication")
"""data_wait: for the next microbatch · forward: embedding, head and loss, and all of an explicit model · solve: passes
without gradient · phantom: passes with gradient · backward · optimizer · communication: in collectives, waiting for
the other ranks included."""


class StepTimes:
    """The switches of one step; reading them waits until the device has passed the last one."""

    def __init__(self, platform: Platform, switches: list[tuple[str, Any]], end: Any) -> None:
        self._platform, self._switches, self._end = platform, switches, end

    def seconds(self) -> dict[str, float]:
        """Seconds of every part (0 where the step had none), and ``step``, their sum."""
        between = self._platform.seconds_between
        totals = dict.fromkeys(PARTS, 0.0)
        marks = [mark for _, mark in self._switches] + [self._end]
        for (part, mark), following in zip(self._switches, marks[1:]):
            totals[part] += between(mark, following)
        return totals | {"step": sum(totals.values())}


class StepClock:
    """Keeps the time of one step after another."""

    def __init__(self, platform: Optional[Platform] = None) -> None:
        self._platform = platform or current_platform()
        self._switches: list[tuple[str, Any]] = []
        self._running = False

    def switch(self, part: str) -> str:
        """From now on the time is ``part``'s; returns the part before."""
        before = self._switches[-1][0] if self._switches else part
        if self._running and (part != before or not self._switches):
            self._switches.append((part, self._platform.time_mark()))
        return before

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step. ``times`` has the result, also of a step that failed."""
        global _current
        self._switches, self._running, previous = [], True, _current
        _current = self
        self.switch("forward")
        try:
            yield
        finally:
            _current, self._running = previous, False
            self.times = StepTimes(self._platform, self._switches, self._platform.time_mark())


_current: Optional[StepClock] = None


def switch_to(part: str) -> str:
    """Switches the clock of the step that runs, one of PARTS; returns the part before, for switching back."""
    return _current.switch(part) if _current is not None else part


@contextlib.contextmanager
def timed_as(part: str) -> Iterator[None]:
    """Counts a block as ``part``, whatever runs around it."""
    before = switch_to(part)
    try:
        yield
    finally:
        switch_to(before)

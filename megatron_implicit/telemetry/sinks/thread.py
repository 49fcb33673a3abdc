"""Feeds each sink on a thread of its own: one that waits for a network or a disk holds up neither training nor the
other sinks. A sink that fails is reported once, rests, and is tried again."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any, Callable, Optional

from megatron_implicit.device import current_platform
from megatron_implicit.errors import MegatronImplicitError
from megatron_implicit.telemetry.sinks.base import Sink
from megatron_implicit.telemetry.timing import PARTS, StepTimes

CAPACITY = 512
"""Steps and events that may wait for a sink. Beyond that the newest are left out: one that hangs must not fill the
memory."""
REST_S = 30.0
"""Seconds a sink that failed is left alone."""

Report = Callable[[str], None]


class SinkThreads:
    """Hands steps and events to sinks, in order.

    Args:
        sinks: opened on their threads, since some wait for a network.
        report: told, once for each trouble, what is wrong with a sink and when it is right again; on any thread.
        local_rank: of this process: its threads read times of its device.
    """

    def __init__(self, sinks: list[Sink], report: Report, local_rank: int = 0) -> None:
        self._places = [_Place(sink, report, local_rank) for sink in sinks]

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any], times: Optional[StepTimes] = None) -> None:
        """Takes a step's numbers; returns at once.

        Args:
            metrics: of the job, where this rank writes them.
            rank: of this rank, without times.
            times: of this rank; read on the sinks' threads, when the device has passed them.

        Raises:
            MegatronImplicitError: a sink found that this job has to end.
        """
        made = _Step(metrics, rank, times)
        for place in self._places:
            place.raise_error()
            place.submit(lambda place=place: place.call("step", made.numbers))

    def event(self, event: dict[str, Any]) -> None:
        """Takes an event; returns at once."""
        for place in self._places:
            place.submit(lambda place=place: place.call("event", lambda: (event,)))

    def flush(self, timeout: float) -> bool:
        """Asks all sinks to write what they were given, and waits for those a checkpoint relies on; whether they have."""
        waits = [(place.flush(), place.sink.essential) for place in self._places]
        return self._wait([done for done, essential in waits if essential], timeout)

    def drain(self, timeout: float) -> bool:
        """Waits until every sink has done all it was given, at most ``timeout`` seconds; whether they have."""
        return self._wait([place.flush() for place in self._places], timeout)

    def close(self, timeout: float) -> None:
        """Closes the sinks and ends their threads; those that have not ended in time are left to themselves."""
        for place in self._places:
            place.close()
        deadline = time.monotonic() + timeout
        for place in self._places:
            place.join(max(0.0, deadline - time.monotonic()))

    @staticmethod
    def _wait(events: list[threading.Event], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        return all(event.wait(max(0.0, deadline - time.monotonic())) for event in events)


class _Step:
    """A step's numbers, put together once, when the first sink asks."""

    def __init__(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any], times: Optional[StepTimes]) -> None:
        self._metrics, self._rank, self._times = metrics, rank, times
        self._lock = threading.Lock()

    def numbers(self) -> tuple[Optional[dict[str, Any]], dict[str, Any]]:
        """The job's and this rank's, with times."""
        with self._lock:
            if self._times is not None:
                self._add(self._times.seconds())
                self._times = None
        return self._metrics, self._rank

    def _add(self, seconds: dict[str, float]) -> None:
        parts = {f"{part}_s": seconds[part] for part in PARTS}
        busy = seconds["step"] - seconds["communication"]
        self._rank = {**self._rank, **parts, "step_s": seconds["step"], "busy_s": busy}
        if self._metrics is not None:
            self._metrics = self._metrics | {f"time_{part}_s": round(seconds[part], 6) for part in PARTS}


class _Place:
    """A sink, its thread, and whether it is in trouble."""

    def __init__(self, sink: Sink, report: Report, local_rank: int) -> None:
        self.sink, self._report, self._local_rank = sink, report, local_rank
        self._troubled, self._rests_until, self._closed, self._left_out = False, 0.0, False, False
        self._error: Optional[MegatronImplicitError] = None
        self._queue: "queue.Queue[Optional[Callable[[], None]]]" = queue.Queue(CAPACITY)
        self._thread = threading.Thread(target=self._work, name=f"sink {sink.name}", daemon=True)
        self._thread.start()

    def raise_error(self) -> None:
        """On the training thread: what the sink found that ends the job."""
        if self._error is not None:
            raise self._error

    def submit(self, task: Optional[Callable[[], None]]) -> bool:
        """Whether there was room for it."""
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            if not self._left_out:
                self._left_out = True
                self._say(f"{self.sink.name} is {CAPACITY} steps behind: what follows is left out until it catches up")
            return False
        return True

    def call(self, what: str, arguments: Callable[[], tuple[Any, ...]] = tuple) -> None:
        """A method of the sink, unless it rests."""
        if self._closed or (self.sink.rests and time.monotonic() < self._rests_until):
            return
        try:
            getattr(self.sink, what)(*arguments())
        except MegatronImplicitError as error:
            self._error = error
        except Exception as error:  # whatever a sink does, training goes on
            self._failed(what, error)
        else:
            if self._troubled and what != "close":
                self._troubled = False
                self._say(f"{self.sink.name} works again")

    def flush(self) -> threading.Event:
        """Set when what was given has been written."""
        done = threading.Event()

        def flush() -> None:
            self.call("flush")
            done.set()

        self.submit(flush)
        return done

    def close(self) -> None:
        """After what was given."""
        self.submit(lambda: self.call("close"))
        self.submit(None)

    def join(self, timeout: float) -> None:
        """Waits for the thread's end."""
        self._thread.join(timeout)

    def _work(self) -> None:
        current_platform().use(self._local_rank)  # a new thread's device is 0: every rank would take memory there
        self.call("open")
        while (task := self._queue.get()) is not None:
            task()

    def _failed(self, what: str, error: Exception) -> None:
        self._closed = what in ("open", "close")
        self._rests_until = time.monotonic() + REST_S
        if not self._troubled:
            self._troubled = True
            self._say(f"{self.sink.name} failed ({_words(error)}); training goes on without it")

    def _say(self, words: str) -> None:
        with contextlib.suppress(Exception):  # the job may be over
            self._report(words)


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())[:300]

"""Feeds the sinks on a thread of its own. A sink that fails is reported once, rests, and is tried again."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Callable, Optional

from megatron_implicit.errors import MegatronImplicitError
from megatron_implicit.telemetry.sinks.base import Sink
from megatron_implicit.telemetry.timing import PARTS, StepTimes

CAPACITY = 512
"""Steps that may wait. Beyond that the newest are left out: a sink that hangs must not fill the memory."""
REST_S = 30.0
"""Seconds a sink that failed is left alone."""


class SinkThread:
    """Hands steps and events to sinks, in order.

    Args:
        sinks: opened on the thread, since some wait for a network.
        report: told, once for each trouble, what is wrong with a sink and when it is right again; on the thread.
    """

    def __init__(self, sinks: list[Sink], report: Callable[[str], None]) -> None:
        self._places = [_Place(sink, report) for sink in sinks]
        self._report = report
        self._end: Optional[MegatronImplicitError] = None
        self._queue: "queue.Queue[Optional[Callable[[], None]]]" = queue.Queue(CAPACITY)
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, name="telemetry", daemon=True)
        self._thread.start()

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any], times: Optional[StepTimes] = None) -> None:
        """Takes a step's numbers; returns at once.

        Args:
            metrics: of the job, where this rank writes them.
            rank: of this rank, without times.
            times: of this rank; read on the thread, when the device has passed them.

        Raises:
            MegatronImplicitError: a sink found that this job has to end.
        """
        if self._end is not None:
            raise self._end
        self._submit(lambda: self._hand_out(metrics, rank, times))

    def event(self, event: dict[str, Any]) -> None:
        """Takes an event; returns at once."""
        self._submit(lambda: self._for_all("event", event))

    def flush(self, timeout: float) -> bool:
        """Waits until all that was given has reached the sinks, at most ``timeout`` seconds; whether it has."""
        done = threading.Event()

        def flush() -> None:
            self._for_all("flush")
            done.set()

        return self._submit(flush) and done.wait(timeout)

    def close(self, timeout: float) -> None:
        """Closes the sinks and ends the thread; after ``timeout`` seconds it is left to itself."""
        self._submit(lambda: self._for_all("close"))
        self._submit(None)
        self._thread.join(timeout)

    def _submit(self, task: Optional[Callable[[], None]]) -> bool:
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                self._report(f"the sinks are {CAPACITY} steps behind: what follows is left out until they catch up")
            return False
        return True

    def _work(self) -> None:
        self._for_all("open")
        while (task := self._queue.get()) is not None:
            task()

    def _hand_out(
        self, metrics: Optional[dict[str, Any]], rank: dict[str, Any], times: Optional[StepTimes]
    ) -> None:
        if times is not None:
            seconds = times.seconds()
            parts = {f"{part}_s": seconds[part] for part in PARTS}
            rank = {**rank, **parts, "step_s": seconds["step"], "busy_s": seconds["step"] - seconds["communication"]}
            if metrics is not None:
                metrics = metrics | {f"time_{part}_s": round(seconds[part], 6) for part in PARTS}
        self._for_all("step", metrics, rank)

    def _for_all(self, what: str, *args: Any) -> None:
        for place in self._places:
            try:
                place.call(what, *args)
            except MegatronImplicitError as error:
                self._end = error


class _Place:
    """A sink, and whether it is in trouble."""

    def __init__(self, sink: Sink, report: Callable[[str], None]) -> None:
        self._sink, self._report = sink, report
        self._troubled, self._rests_until, self._closed = False, 0.0, False

    def call(self, what: str, *args: Any) -> None:
        if self._closed or (self._sink.rests and time.monotonic() < self._rests_until):
            return
        try:
            getattr(self._sink, what)(*args)
        except MegatronImplicitError:
            raise
        except Exception as error:  # whatever a sink does, training goes on
            self._failed(what, error)
        else:
            if self._troubled and what != "close":
                self._troubled = False
                self._report(f"{self._sink.name} works again")

    def _failed(self, what: str, error: Exception) -> None:
        self._closed = what in ("open", "close")
        self._rests_until = time.monotonic() + REST_S
        if not self._troubled:
            self._troubled = True
            self._report(f"{self._sink.name} failed ({_words(error)}); training goes on without it")


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

"""Ends a job in which a rank makes no progress, and leaves the stacks of all ranks behind."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from pathlib import Path
from typing import Callable

import torch.distributed as dist

from megatron_implicit import exits

GRACE_S = 5.0
"""What a rank that has written its stacks leaves the others for theirs, before it ends the job."""
_POLL_S = 0.5


class Progress:
    """Where the training thread has got to, for whoever watches it from another thread."""

    def __init__(self) -> None:
        self.alive("the start")

    def alive(self, where: str) -> None:
        """Says that something begins, and so that what was before has ended."""
        self.where, self._since = where, time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last word."""
        return time.monotonic() - self._since


class Watchdog:
    """A thread on every rank that looks whether the training thread still reports, inside a ``with``.

    Ranks wait for each other in every step, so that all of them stand still within a step of the one that hangs. The
    first to notice leaves a file in the run's logs folder; the others see it and write their stacks at once, too. A
    rank that holds the interpreter's lock is caught by faulthandler's own thread.

    Args:
        minutes: without progress that end the job; 0 never does.
        progress: of the training thread.
        logs: folder for the stacks.
        attempt: of this job.
        report: told in one line what happened, on the watching thread.
    """

    def __init__(
        self, minutes: float, progress: Progress, logs: Path, attempt: int, report: Callable[[str], None]
    ) -> None:
        self._limit, self._progress, self._report = 60 * minutes, progress, report
        self._mark = logs / f"hang_attempt{attempt}"
        self._stacks = logs / f"stacks_attempt{attempt}_rank{dist.get_rank():05d}.txt"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._progress.alive("the start")
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._limit:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        progress = self._progress
        while not self._stop.wait(_POLL_S):
            idle = progress.idle_s
            # Needs no lock of the interpreter once it is set, so it speaks even where this thread cannot.
            faulthandler.dump_traceback_later(max(self._limit - idle, 0) + 2 * GRACE_S, file=sys.__stderr__)
            if idle > self._limit:
                with contextlib.suppress(OSError):  # the others then find out by themselves
                    self._mark.touch()
                self._end(f"no progress for {idle:.0f} s in {progress.where}")
            elif self._another_hangs():
                self._end(f"another rank hangs; this one is {idle:.0f} s into {progress.where}")

    def _another_hangs(self) -> bool:
        try:
            return self._mark.exists()
        except OSError:  # a file system that is away for a moment says nothing
            return False

    def _end(self, what: str) -> None:
        """Writes the stacks of all threads to the log and the run's folder, and ends this process."""
        faulthandler.cancel_dump_traceback_later()
        message = f"rank {dist.get_rank()}: {what}"
        print(f"error: {message}: the stacks of all ranks follow and are in {self._stacks.parent}; the job ends and "
              "can go on from its last checkpoint", file=sys.stderr, flush=True)  # fmt: skip
        faulthandler.dump_traceback(file=sys.__stderr__)
        _dump(self._stacks, message)
        try:
            self._report(message)
        finally:
            time.sleep(GRACE_S)
            exits.leave(exits.RESTART)


def _dump(path: Path, message: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file=file)
    except OSError as error:
        print(f"warning: {path}: {error.strerror}", file=sys.stderr, flush=True)

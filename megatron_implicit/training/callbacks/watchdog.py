"""Ends a job in which a rank makes no progress, and leaves the stacks of all ranks behind."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_implicit import exits
from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import Trainer

GRACE_S = 5.0
"""What a rank that has written its stacks leaves the others for theirs, before it ends the job."""
_POLL_S = 0.5


class Watchdog(Callback):
    """A thread on every rank that looks whether the training thread still reports.

    Ranks wait for each other in every step, so that all of them stand still within a step of the one that hangs. The
    first to notice leaves a file in the run's logs folder; the others see it and write their stacks at once, too. A
    rank that holds the interpreter's lock is caught by faulthandler's own thread.

    Args:
        minutes: without progress that end the job; 0 never does.
    """

    def __init__(self, minutes: float) -> None:
        self._limit = 60 * minutes
        self._stop = threading.Event()

    def on_start(self, trainer: "Trainer") -> None:
        if not self._limit:
            return
        self._trainer, attempt = trainer, trainer.folder.lease.attempt
        self._mark = trainer.folder.logs / f"hang_attempt{attempt}"
        self._stacks = trainer.folder.logs / f"stacks_attempt{attempt}_rank{dist.get_rank():05d}.txt"
        trainer.progress.alive("the start")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def on_failure(self, trainer: "Trainer", error: BaseException) -> None:
        self._leave()

    def on_end(self, trainer: "Trainer") -> None:
        self._leave()

    def _leave(self) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        progress = self._trainer.progress
        while not self._stop.wait(_POLL_S):
            idle = progress.idle_s
            # Needs no lock of the interpreter once it is set, so it speaks even where this thread cannot.
            faulthandler.dump_traceback_later(max(self._limit - idle, 0) + 2 * GRACE_S, file=sys.__stderr__)
            if idle > self._limit:
                self._mark.touch()
                self._end(f"no progress for {idle:.0f} s in {progress.where}")
            elif self._mark.exists():
                self._end(f"another rank hangs; this one is {idle:.0f} s into {progress.where}")

    def _end(self, what: str) -> None:
        """Writes the stacks of all threads to the log and the run's folder, and ends this process."""
        faulthandler.cancel_dump_traceback_later()
        message = f"rank {dist.get_rank()}: {what}"
        print(f"error: {message}: the stacks of all ranks follow and are in {self._stacks.parent}; the job ends and "
              "can go on from its last checkpoint", file=sys.stderr, flush=True)  # fmt: skip
        faulthandler.dump_traceback(file=sys.__stderr__)
        _dump(self._stacks, message)
        try:
            self._trainer.event("hang", message)
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

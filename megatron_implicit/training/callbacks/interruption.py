"""Ends a job in good order: on a signal, or before the time limit ends it without asking."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, Mapping, Optional

from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.config import RunConfig
    from megatron_implicit.training.trainer import StepRecord, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a job to stop: sent by Slurm, launchers and people."""
END_TIMES = ("MEGATRON_IMPLICIT_END_TIME", "SLURM_JOB_END_TIME")
"""Where the unix time of the limit may stand: what a batch script found out, or Slurm's own (since 22.05)."""
_TIME_LIMIT = 1
"""The proposal of a rank whose time runs out; a signal proposes its number, which is larger."""


class Interruption(Callback):
    """The step in which any rank is asked to stop, or the one after it, is the last of this job.

    What each rank knows is exchanged while a step runs: the answer costs no time and comes a step late at most.

    Args:
        run: limit and margin.
        environment: of the process.
    """

    def __init__(self, run: "RunConfig", environment: Mapping[str, str] = os.environ) -> None:
        self._margin = run.time_margin_s
        self._deadline = deadline(run, environment, time.time())
        self._signal = 0
        self._longest_step = 0.0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def proposals(self, trainer: "Trainer") -> dict[str, int]:
        """Why this rank wants to stop; 0 if it does not."""
        needed = self._margin + 2 * self._longest_step + trainer.save_seconds
        out_of_time = self._deadline is not None and time.time() + needed >= self._deadline
        return {"stop": self._signal or (_TIME_LIMIT if out_of_time else 0)}

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        self._longest_step = max(self._longest_step, record.seconds)
        reason = trainer.agreed["stop"]
        if reason:
            trainer.stop("the time limit is near" if reason == _TIME_LIMIT else signal.Signals(reason).name)

    def on_exit(self, trainer: "Trainer") -> None:
        self._restore()  # not before the last checkpoint is there: another signal would kill the rank that saves it

    def _remember(self, number: int, frame: Optional[FrameType]) -> None:
        self._signal = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def deadline(run: "RunConfig", environment: Mapping[str, str], now: float) -> Optional[float]:
    """Unix time by which a job that starts now must have ended; None without a limit."""
    if run.time_limit_minutes is not None:
        return now + 60 * run.time_limit_minutes
    for name in END_TIMES:
        end = environment.get(name, "")
        if end.isdigit() and int(end):
            return float(end)
    return None

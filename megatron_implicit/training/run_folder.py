"""The run's folder: who may write to it, and its event log.

A run keeps one id over all its jobs; each job is an *attempt* and holds the folder's *lease*, a token in ``lease.json``.
A job that starts takes the lease over. Ranks of an earlier job that were cut off and come back (a lost node, a stopped
process) find another token there: what they would write is refused and noted in ``logs/refused.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import torch.distributed as dist

from megatron_implicit.checkpoint.layout import sync_folder, write_durably
from megatron_implicit.comm.agreement import control_group
from megatron_implicit.errors import LaunchError, LeaseLostError, MachineError
from megatron_implicit.telemetry.line_file import LineFile

EVENTS_FILE, LEASE_FILE = "events.jsonl", "lease.json"


LEASE_PAUSES_S = (0.1, 1.0, 5.0, 10.0, 20.0, 30.0)
"""Between attempts to read a lease that cannot be read."""


@dataclass(frozen=True)
class Lease:
    """A job's right to write to a run's folder; what ``lease.json`` holds."""

    run_id: str
    """The same in all jobs of the run; what dashboards continue a curve by."""
    attempt: int
    """Jobs that have worked on the run before this one."""
    token: str
    """Only the holder knows it beforehand."""
    host: str
    """Where rank 0 of the holder runs."""
    job: str
    """The holder's Slurm job, or its process."""
    since: float
    """Unix time at which it was taken."""


def read_lease(run_dir: Path) -> Optional[Lease]:
    """Who holds the folder; None where nobody ever did."""
    try:
        return _load_lease(run_dir)
    except (OSError, ValueError, TypeError):
        return None


def _load_lease(run_dir: Path) -> Lease:
    return Lease(**json.loads((run_dir / LEASE_FILE).read_text(encoding="utf-8")))


class RunFolder:
    """A run's folder, as the job sees it that holds its lease.

    Args:
        path: of the folder.
        lease: this job's.
    """

    def __init__(self, path: Path, lease: Lease) -> None:
        self.path, self.lease = path, lease
        self.logs = path / "logs"
        self._events = self.line_file(EVENTS_FILE)
        self.on_event: Callable[[dict[str, Any]], None] = lambda event: None
        """Told every event of this rank."""

    @classmethod
    def take(cls, path: Path, run_id: str = "") -> "RunFolder":
        """Makes the folder if need be and takes its lease over, for all ranks; all must call it.

        Args:
            path: of the folder.
            run_id: the run's, where its checkpoint knows it; else the folder's, else a new one.

        Raises:
            LaunchError: the folder cannot be written.
        """
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                answer = [_take(path, run_id)]
            except OSError as error:
                answer = [LaunchError(f"run.dir={path} cannot be written ({error.strerror}): give another")]
        dist.broadcast_object_list(answer, src=0, group=control_group())
        if isinstance(answer[0], LaunchError):
            raise answer[0]
        return cls(path, answer[0])

    def line_file(self, name: str) -> LineFile:
        """A file of lines in the folder that refuses to grow once the lease is lost."""
        return LineFile(self.path / name, lambda: self.verify(f"a line of {name}"))

    def verify(self, purpose: str) -> None:
        """To be called before anything is written that a later job reads.

        Raises:
            LeaseLostError: another job has taken the lease over; the refusal is in ``logs/refused.jsonl``.
            MachineError: the lease cannot be read, however often it is tried.
        """
        holder = self._holder()
        if holder is not None and holder.token == self.lease.token:
            return
        who = f"attempt {holder.attempt} (job {holder.job} on {holder.host})" if holder else "nobody"
        refusal = {
            "time": time.time(), "attempt": self.lease.attempt, "rank": dist.get_rank(), "host": socket.gethostname(),
            "process": os.getpid(), "refused": purpose, "holder": who,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            LineFile(self.logs / "refused.jsonl").write(refusal)
        raise LeaseLostError(
            f"{self.path} is held by {who}, no longer by this job's attempt {self.lease.attempt}: {purpose} was refused "
            "and this job ends"
        )

    def _holder(self) -> Optional[Lease]:
        """Who holds the folder; None where its file is gone. A network's file system may be away for a moment."""
        for pause in (*LEASE_PAUSES_S, None):
            try:
                return _load_lease(self.path)
            except FileNotFoundError:
                return None
            except (OSError, ValueError, TypeError) as error:
                problem = error
            if pause is not None:
                time.sleep(pause)
        raise MachineError(f"{self.path / LEASE_FILE} cannot be read ({problem}): the job ends, and can be started again")

    def event(self, kind: str, message: str, step: int) -> None:
        """Appends a line to events.jsonl; the caller decides which rank speaks."""
        event = {
            "time": time.time(), "step": step, "attempt": self.lease.attempt, "kind": kind, "rank": dist.get_rank(),
            "message": message,
        }  # fmt: skip
        self._events.write(event)
        self.on_event(event)

    def warn(self, kind: str, message: str, step: int) -> None:
        """An event that is also said aloud."""
        print(f"warning: {message}", file=sys.stderr, flush=True)
        self.event(kind, message, step)


def _take(path: Path, run_id: str) -> Lease:
    (path / "logs").mkdir(parents=True, exist_ok=True)
    lease = _new_lease(path, run_id)
    partial = path / f"{LEASE_FILE}.{lease.token}"
    write_durably(partial, json.dumps(asdict(lease), indent=1) + "\n")
    os.replace(partial, path / LEASE_FILE)
    sync_folder(path)
    return lease


def _new_lease(path: Path, run_id: str) -> Lease:
    held = read_lease(path)
    attempt = held.attempt + 1 if held else _attempts_in_events(path / EVENTS_FILE)
    run_id = run_id or (held.run_id if held else "") or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    job = os.environ.get("SLURM_JOB_ID") or f"process {os.getpid()}"
    return Lease(run_id, attempt, secrets.token_hex(8), socket.gethostname(), job, time.time())


def _attempts_in_events(path: Path) -> int:
    """Jobs that left events in a folder without a lease."""
    attempts = [-1]
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                attempts.append(int(json.loads(line)["attempt"]))
    return max(attempts) + 1

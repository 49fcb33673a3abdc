"""Runs a function on several processes at once, on real process groups (Gloo), and returns what each rank returned.

Importing torch and Megatron-Core costs seconds a process, so a ``WorkerPool`` keeps its processes between jobs::

    def losses(seed: int) -> float:            # an importable function; every rank calls it
        start_model_parallel(ParallelConfig(tensor=2))
        ...

    def test_ranks_agree(pool):                # the fixture of tests/conftest.py: one pool a world size
        first, second = pool(2).run(losses, 7)
        assert first == second

Each job finds a new default process group and no Megatron-Core groups. An exception of any rank, a dead process and a
timeout raise ``DistributedError`` with every rank's traceback; processes that may be stuck are replaced. Workers are
programs of their own, not forks: no threads, locks or captured output of pytest's process get into them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Callable, Optional

REPOSITORY = Path(__file__).parents[2]

START_TIMEOUT = 120.0
"""Seconds a new process may take to import torch and Megatron-Core."""

GRACE = 5.0
"""Seconds the other ranks get to end by themselves once one has failed."""

LIFETIME = 8
"""Jobs that a set of processes runs before it is replaced: Gloo's threads outlive their groups and keep polling, and
after some dozens of jobs take most of the processor."""

LEAVE = b"leave"
"""The message that ends a job on a worker."""

OUTPUT_LIMIT = 4000
"""Characters of a rank's output in a failure's message."""


class DistributedError(AssertionError):
    """A job failed on at least one rank.

    Attributes:
        errors: what happened, by failed rank: a traceback, or where the rank was stuck.
    """

    def __init__(self, what: str, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__("\n".join([what, *(f"--- rank {rank}: {text.rstrip()}" for rank, text in errors.items())]))


@dataclass(frozen=True)
class Job:
    """What a worker is told to do."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rendezvous: str
    """Path of the file through which the ranks meet."""
    timeout: float
    """Seconds a collective may take."""


@dataclass(frozen=True)
class Reply:
    """How a job ended on a rank."""

    value: Any = None
    error: Optional[str] = None
    """The traceback, or None."""


@dataclass
class _Worker:
    rank: int
    process: "subprocess.Popen[bytes]"
    connection: Connection
    log: Path
    log_start: int = field(default=0)
    """Size of the log when the current job began."""

    def output(self) -> str:
        """What the process printed during the current job, its end only if it is long."""
        with open(self.log, "rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")[-OUTPUT_LIMIT:]

    def dump_stack(self) -> None:
        """Lets the process write where it is into its log."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Ends the process and what it started: its group outlives it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class WorkerPool:
    """``world_size`` processes that run one job after another. They start with the first job."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megatron_implicit-pool-")
        self._jobs = 0
        self._jobs_of_workers = 0

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Calls ``function(*args, **kwargs)`` on every rank and returns the values in order of ranks.

        Args:
            function: importable by name (no lambda, nothing defined inside a function).
            timeout: seconds the whole job may take; starting the processes is not counted.

        Raises:
            DistributedError: a rank raised, died or did not finish in time.
        """
        if "<" in function.__qualname__:
            raise TypeError(f"{function.__qualname__} cannot be imported by the workers: define it at a module's top")
        self._jobs += 1
        job = Job(function, args, kwargs, f"{self._folder.name}/rendezvous-{self._jobs}", timeout)
        message = pickle.dumps(job)
        self._start_missing_workers()
        for worker in self._workers:
            worker.log_start = worker.log.stat().st_size
            worker.connection.send_bytes(message)
        replies = self._collect(timeout)
        errors = {rank: reply.error for rank, reply in replies.items() if reply.error}
        stuck = [worker for worker in self._workers if worker.rank not in replies]
        if stuck:
            words = "still running when another rank failed" if errors else "did not finish in time"
            errors |= self._describe_stuck(stuck, words)
        self._jobs_of_workers += 1
        if stuck or not self._leave_job() or self._jobs_of_workers >= LIFETIME:
            self.close()
        if errors:
            what = f"{function.__qualname__} failed on {len(errors)} of {self.world_size} ranks"
            raise DistributedError(what, dict(sorted(errors.items())))
        return [replies[rank].value for rank in range(self.world_size)]

    def close(self) -> None:
        """Ends the processes. The pool may be used again: it starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers, self._jobs_of_workers = [], 0

    def _start_missing_workers(self) -> None:
        if any(worker.process.poll() is not None for worker in self._workers):
            self.close()
        if not self._workers:
            self._workers = [self._start(rank) for rank in range(self.world_size)]
            replies = self._collect(START_TIMEOUT)
            if len(replies) < self.world_size or any(reply.error for reply in replies.values()):
                errors = {worker.rank: worker.output() for worker in self._workers}
                self.close()
                raise DistributedError("the workers did not start", errors)

    def _start(self, rank: int) -> _Worker:
        ours, theirs = socket.socketpair()
        log = Path(self._folder.name) / f"rank{rank}.log"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world_size),
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.worker", str(theirs.fileno())],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        theirs.close()
        return _Worker(rank, process, Connection(ours.detach()), log)

    def _collect(self, timeout: float) -> dict[int, Reply]:
        """The replies that came in time; once a rank failed, the others have ``GRACE`` seconds."""
        waiting = {worker.connection: worker for worker in self._workers}
        replies: dict[int, Reply] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                worker = waiting.pop(connection)
                replies[worker.rank] = reply = self._receive(worker)
                if reply.error:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return replies

    @staticmethod
    def _receive(worker: _Worker) -> Reply:
        try:
            reply: Reply = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            return Reply(error=f"the process ended with code {worker.process.wait()}\n{worker.output()}")
        if reply.error and (output := worker.output().strip()):
            return Reply(error=f"{reply.error}\nIts output:\n{output}")
        return reply

    def _leave_job(self) -> bool:
        """Takes down the process groups, on all ranks at once; False where a process cannot."""
        if any(worker.process.poll() is not None for worker in self._workers):
            return False
        for worker in self._workers:
            worker.connection.send_bytes(LEAVE)
        replies = self._collect(GRACE)
        return len(replies) == self.world_size and not any(reply.error for reply in replies.values())

    @staticmethod
    def _describe_stuck(workers: list[_Worker], words: str) -> dict[int, str]:
        for worker in workers:
            worker.dump_stack()
        time.sleep(0.5)
        return {worker.rank: f"{words}; it was at\n{worker.output()}" for worker in workers}


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """As ``WorkerPool.run``, on processes of its own: for jobs that kill or change their process."""
    with WorkerPool(world_size) as pool:
        return pool.run(function, *args, timeout=timeout, **kwargs)

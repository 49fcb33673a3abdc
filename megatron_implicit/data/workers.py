"""Worker processes that tokenize shards, one at a time each, and tell their parent what they do.

They are forked, so they share the loaded tokenizer, and die with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_implicit.data.shards import Counts, Recipe, Shard, tokenize_shard
from megatron_implicit.errors import DataError

_INTERVAL = 0.2
"""Seconds between reports of a worker."""
_WARNINGS = 20
"""Skipped records of a shard that are named on the way; the manifest names more and counts all."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors after which no other shard can be written either."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Progress:
    """Work done since the worker's last report."""

    counts: Counts


@dataclass(frozen=True)
class Warned:
    """A record was left out."""

    message: str


@dataclass(frozen=True)
class Done:
    """A shard is finished."""

    shard: int


@dataclass(frozen=True)
class Failed:
    """A shard could not be made."""

    shard: int
    message: str
    fatal: bool
    """Whether it makes no sense to go on with others."""


Message = Progress | Warned | Done | Failed


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    shard: int | None = None
    """The one it works on."""


class Workers:
    """A context manager of ``count`` processes that tokenize ``shards`` by ``recipe``."""

    def __init__(self, count: int, shards: Sequence[Shard], recipe: Recipe) -> None:
        self._shards = shards
        self._workers = [self._start(recipe) for _ in range(count)]

    def _start(self, recipe: Recipe) -> _Worker:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._shards, recipe, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    @property
    def busy(self) -> bool:
        """Whether any works."""
        return any(worker.shard is not None for worker in self._workers)

    @property
    def idle(self) -> int:
        """How many live and have nothing to do."""
        return sum(worker.shard is None for worker in self._workers)

    def start(self, shard: int) -> None:
        """Gives a shard to an idle worker."""
        worker = next(worker for worker in self._workers if worker.shard is None)
        worker.shard = shard
        with contextlib.suppress(BrokenPipeError):  # it died while idle: ``messages`` finds out
            worker.connection.send(shard)

    def messages(self, timeout: float) -> Iterator[Message]:
        """What the workers tell, after waiting for at most ``timeout`` seconds."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout):
            worker = by_connection[connection]
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                yield from self._bury(worker)
                continue
            if isinstance(message, (Done, Failed)):
                worker.shard = None
            yield message

    def _bury(self, worker: _Worker) -> Iterator[Message]:
        worker.process.join()
        self._workers.remove(worker)
        if worker.shard is not None:
            words = f"{self._shards[worker.shard].source}: its worker died (exit code {worker.process.exitcode}"
            remedy = "; if memory ran out, use fewer --workers); start the command again to go on"
            yield Failed(worker.shard, words + remedy, fatal=not self._workers)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()


def _work(connection: Connection, shards: Sequence[Shard], recipe: Recipe, parent: int) -> None:
    """The worker: shards by number until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes partial files on the way
    _die_with(parent)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(_attempt(connection.recv(), shards, recipe, connection.send))


def _attempt(number: int, shards: Sequence[Shard], recipe: Recipe, send: Callable[[Message], None]) -> Message:
    reporter = _Reporter(send)
    try:
        tokenize_shard(shards[number], recipe, reporter.report, reporter.warn)
    except DataError as error:
        return Failed(number, str(error), fatal=False)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        shard = shards[number]
        if error.errno in _NO_ROOM:
            return Failed(number, f"cannot write {shard.prefix}: {error.strerror}; make room and start again", True)
        return Failed(number, f"{error.filename or shard.source}: {error.strerror or error}; check the file", False)
    except Exception:
        return Failed(number, f"{shards[number].source}: {traceback.format_exc()}", fatal=True)
    reporter.flush()
    return Done(number)


class _Reporter:
    """Sends a shard's counts and warnings, not too often."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._counts, self._sent = Counts(), Counts()
        self._next = time.monotonic() + _INTERVAL
        self._warnings = 0

    def report(self, counts: Counts) -> None:
        self._counts = counts
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        self._send(Progress(self._counts - self._sent))
        self._sent, self._next = self._counts, time.monotonic() + _INTERVAL

    def warn(self, message: str) -> None:
        self._warnings += 1
        if self._warnings <= _WARNINGS:
            self._send(Warned(message))


def _die_with(parent: int) -> None:
    """Has Linux kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

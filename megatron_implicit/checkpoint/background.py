"""Writes this rank's share of a checkpoint to disk: here, or in a forked process while training goes on.

A fork sees memory as it was, so on a CPU nothing is copied first: the kernel copies the pages that training changes
meanwhile. A GPU copies its tensors to the host while it goes on with the next step, up to the update, to memory that is
kept for the next checkpoint; the fork comes after that. Only the parent touches the device and the process group.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import stat
import sys
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from megatron_implicit.checkpoint.integrity import FileEntry, measure_file
from megatron_implicit.device.host_memory import HostMemory


@dataclass
class Written:
    """What became of a rank's share."""

    results: Any = field(default_factory=list)
    """Megatron-Core's write results by file, or the exception that ended the writing."""
    entries: dict[str, FileEntry] = field(default_factory=dict)
    """For the manifest: the files of this rank."""


class BackgroundWrite:
    """One rank's writing of one checkpoint.

    Args:
        request: Megatron-Core's AsyncRequest of this rank.
        memory: for tensors that are not on the host; nothing else may use it until the outcome is there.
        asynchronous: fork; otherwise everything is on disk when this returns.
    """

    def __init__(self, request: Any, memory: HostMemory, *, asynchronous: bool) -> None:
        self._request, self._memory = request, memory
        self._written: Optional[Written] = None
        self._process: Any = None
        self._copying: Optional[list[Any]] = None
        """Arguments of the writing, while the device may still copy."""
        if request.async_fn is None:
            self._written = Written()  # nothing of the checkpoint is this rank's to write
            return
        arguments = list(request.async_fn_args)
        arguments[1] = _on_host(arguments[1], memory)
        if not asynchronous:
            memory.finish_copy()
            self._written = _write(request, arguments)
        elif arguments[1] is request.async_fn_args[1]:
            self._fork(arguments)
        else:
            self._copying = arguments

    def finish_copy(self) -> None:
        """To be called before a tensor of the checkpoint changes, and by whoever waits for the outcome."""
        if self._copying is not None:
            self._memory.finish_copy()
            self._fork(self._copying)
            self._copying = None

    def done(self) -> bool:
        """Whether the share is on disk, or never will be."""
        if self._written is None and self._process is not None and self._connection.poll():
            self._receive()
        return self._written is not None

    def wait(self) -> Written:
        """The outcome, when it is there."""
        self.finish_copy()
        if self._written is None:
            self._receive()
        return self._written

    def abandon(self) -> None:
        """Stops the writing."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()

    def _fork(self, arguments: list[Any]) -> None:
        self._connection, theirs = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(
            target=_child, args=(theirs, self._connection, self._request, arguments)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
            try:
                self._process.start()
            except OSError as error:  # no room for another process: the rank writes by itself
                print(f"warning: a checkpoint is not written in the background: {error}", file=sys.stderr, flush=True)
                self._process = None
                self._connection.close()
                self._written = _write(self._request, arguments)
        theirs.close()

    def _receive(self) -> None:
        try:
            self._written = self._connection.recv()
        except EOFError:
            self._written = Written(RuntimeError("the process that writes the checkpoint was killed"))
        self._connection.close()
        self._process.join()


def _on_host(buckets: list[Any], memory: HostMemory) -> list[Any]:
    """Megatron-Core's buckets, (path, name, (byte items, [(item, tensor)])), with every tensor in the host's memory: the same
    ones if they are there, or copies that have been begun."""
    away = [tensor for _, _, (_, items) in buckets for _, tensor in items if _is_away(tensor)]
    if not away:
        return buckets
    copies = iter(memory.begin_copy(away))
    return [
        (path, name, (data, [(item, next(copies) if _is_away(tensor) else tensor) for item, tensor in items]))
        for path, name, (data, items) in buckets
    ]


def _is_away(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _child(connection: Connection, parents_end: Connection, request: Any, arguments: list[Any]) -> None:
    """Life of the forked process. Signals that tell the job to end are its parent's to act on."""
    parents_end.close()  # or a parent that dies would leave this process waiting for a reader for ever
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # what the parent left unreachable is its own to free: a device's tensors cannot be freed from here
    _close_sockets()
    with contextlib.suppress(BrokenPipeError):  # the parent died
        connection.send(_write(request, arguments))
        connection.close()
    os._exit(0)  # without the clean-up of what the parent still uses


def _close_sockets() -> None:
    """Leaves the process group's connections to the parent: if it dies, its peers must see them close, and its port be
    free, while this process still writes."""
    for entry in Path("/proc/self/fd").glob("*"):  # where there is no /proc, nothing is closed
        with contextlib.suppress(OSError):
            descriptor = int(entry.name)
            if descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)


def _write(request: Any, arguments: list[Any]) -> Written:
    """Runs Megatron-Core's writing function and sums up the files it made."""
    answers: "queue.Queue[Any]" = queue.Queue()
    buckets, arguments[2] = arguments[1], answers
    try:
        request.async_fn(*arguments, **(request.async_fn_kwargs or {}))
        results = answers.get_nowait()
        if isinstance(results, Exception):
            return Written(results)
        return Written(results, {Path(path).name: measure_file(Path(path)) for path, *_ in buckets})
    except Exception as error:
        return Written(error)

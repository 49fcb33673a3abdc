"""Processes that a rank forks, to write checkpoints for example, end with it.

One that is left behind waits for its parent for ever, holds memory, and lets Slurm drain the node: it is no longer the
child of anything that Slurm knows.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl: the signal a process gets when its parent dies (Linux)."""


def end_children_with_this_process() -> None:
    """From now on every fork of this process, and theirs, is killed when its parent dies. Does nothing but on Linux."""
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def remember() -> None:
        nonlocal parent
        parent = os.getpid()

    def bind() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os._exit(1)

    os.register_at_fork(before=remember, after_in_child=bind)

"""Exit codes of all commands: what a launcher or a batch script may conclude from how a process ended.

``launch/pretrain.py`` ends with DONE, FAILURE, USAGE, REQUEUE, RESTART or INTERRUPTED; the commands in ``tools/`` never
ask to be started again. Any other code (137 after a kill, for example) is a process that died without a word: worth
another start from the last checkpoint, as RESTART is, but not without end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from typing import NoReturn

DONE = 0
"""Finished: nothing is left to do."""
FAILURE = 1
"""An error that another start would meet again; its message says what to do."""
USAGE = 2
"""What must not be started again as it is: a configuration or command line that cannot be run, or a run that another job
has taken over."""
INCOMPLETE = 3
"""Finished, but something of the input had to be left out."""
REQUEUE = 75
"""Stopped in good order before its end, on a signal or near the time limit, with a checkpoint: start it again."""
RESTART = 76
"""Something broke that is not the run's own: an unexpected exception, a file system or machine that failed, or its own
watch ended it (a hung rank, ranks or parameters that went wrong in memory). Its last checkpoint is good and another start
may succeed; limit how often that is tried without progress."""
INTERRUPTED = 130
"""By the keyboard."""

EXIT_FILE_VARIABLE = "MEGATRON_IMPLICIT_EXIT_FILE"
"""Environment variable naming a file to which each rank that ends adds a line 'RANK CODE'."""


def leave(code: int) -> NoReturn:
    """Ends this process now, without waiting for threads or other ranks, and leaves word of its code.

    A launcher reports one code for all ranks: the highest, be it of a rank that was killed because another one ended. The
    file has what each rank meant.
    """
    record_exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_within(seconds: int) -> None:
    """Ends this process after ``seconds`` by SIGALRM, its stacks on stderr, where it has not ended by itself.

    For the end of a job: libraries that wait for each other as they close would hold all its nodes to its time limit. It
    asks nothing of the interpreter, which may be waiting itself.
    """
    faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds + 1)


def record_exit(code: int) -> None:
    """Adds 'RANK CODE' to the file of EXIT_FILE_VARIABLE, if that is set."""
    path = os.environ.get(EXIT_FILE_VARIABLE)
    if path:
        # One write of a short line to a file opened for appending: lines of several ranks do not mix. Without room on
        # the disk the process must end all the same.
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{os.environ.get('RANK', 0)} {code}\n")

"""Exit codes of all commands: what a launcher or a batch script may conclude from how a process ended.

``launch/pretrain.py`` ends with DONE, FAILURE, USAGE, REQUEUE, RESTART or INTERRUPTED; the commands in ``tools/`` never
ask to be started again. Any other code (137 after a kill, for example) is a process that died without a word: worth
another start from the last checkpoint, as RESTART is, but not without end.
"""

from __future__ import annotations

DONE = 0
"""Finished: nothing is left to do."""
FAILURE = 1
"""An error that another start would meet again; its message says what to do."""
USAGE = 2
"""A configuration or command line that cannot be run."""
INCOMPLETE = 3
"""Finished, but something of the input had to be left out."""
REQUEUE = 75
"""Stopped in good order before its end, on a signal or near the time limit, with a checkpoint: start it again."""
RESTART = 76
"""Ended by its own watch (a hung rank, ranks or parameters that went wrong in memory): its last checkpoint is good and
another start may succeed; limit how often that is tried without progress."""
INTERRUPTED = 130
"""By the keyboard."""

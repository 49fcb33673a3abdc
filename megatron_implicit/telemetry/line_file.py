"""Files of JSON objects, one a line, that several jobs append to one after another."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk or an exhausted quota."""


class LineFile:
    """Appends lines to a file, made at the first of them.

    A line reaches the file in one write, so a killed job tears at most its last one; the next writer closes that line.
    A full disk does not end a run: lines wait in memory until there is room. Threads may share a file.

    Args:
        path: of the file.
        fence: called before every write; raises where this job may no longer write.
    """

    def __init__(self, path: Path, fence: Optional[Callable[[], None]] = None) -> None:
        self._path, self._fence = path, fence
        self._descriptor: Optional[int] = None
        self._waiting = b""
        self._lock = threading.Lock()

    def write(self, values: dict[str, Any]) -> None:
        """One line, in the file when this returns. Numbers that are not finite become null: JSON has none."""
        finite = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._append(line)

    def _append(self, line: bytes) -> None:
        if self._fence:
            self._fence()
        full_before = bool(self._waiting)
        self._waiting += line
        try:
            self._flush()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            if not full_before:
                print(f"warning: {self._path}: {error.strerror}; lines wait for room", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _flush(self) -> None:
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if not _ends_in_a_line(self._path):
                self._waiting = b"\n" + self._waiting
        while self._waiting:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]


def _ends_in_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)

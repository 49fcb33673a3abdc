"""How far a preparation is: a bar on a terminal, else a line now and then, so that a job's log stays readable."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_implicit.data.shards import Counts

_LOG_INTERVAL = 30.0
"""Seconds between lines where there is no terminal."""


class PreparationProgress:
    """Shows shards, MB/s of text, tokens/s and the time left, on stderr. A context manager.

    Args:
        shards: how many are to be made.
        total_bytes: of their files; the time left is by the share of it that has been read.
        shown: False for all but one process of a job.
    """

    def __init__(self, shards: int, total_bytes: int, shown: bool = True) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.fields[words]}"))
        terminal = self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not (shown and terminal))
        self._task = self._bar.add_task("", total=total_bytes, words="")
        self._logs = shown and not terminal
        self._shards, self._total, self._done = shards, total_bytes, Counts()
        self._start = time.monotonic()
        self._next_line = self._start + _LOG_INTERVAL

    def show(self, news: Counts) -> None:
        """Adds new work and shows where things stand; to be called often."""
        self._done += news
        now = time.monotonic()
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._done.read_bytes, words=self._words(now))
        elif self._logs and now >= self._next_line:
            self._next_line = now + _LOG_INTERVAL
            self._console.print(f"tokenizing: {self._words(now)}")

    def say(self, message: str) -> None:
        """A line of text, above the bar."""
        self._console.print(message, markup=False)

    def _words(self, now: float) -> str:
        done, seconds = self._done, max(now - self._start, 1e-9)
        words = (
            f"{done.read_bytes / 1e9:.2f} of {self._total / 1e9:.2f} GB of {self._shards} files,"
            f" {done.text_bytes / seconds / 1e6:.1f} MB/s of text, {done.tokens / seconds / 1e6:.2f}M tokens/s"
        )
        if not done.read_bytes:
            return words
        return f"{words}, {_duration(seconds * (self._total / done.read_bytes - 1))} left"

    def __enter__(self) -> PreparationProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"

"""A progress bar for reading a corpus: share of the files, MB and tokens a second, time left; none off a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_implicit.data.corpus import CorpusReader
from megatron_implicit.data.preparation import Report

_INTERVAL = 0.1
"""Seconds between updates."""


@contextlib.contextmanager
def corpus_progress(words: str) -> Iterator[Report]:
    """A bar labelled ``words``; call what it yields after every document."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=None, rates="")
        start = updated = time.monotonic()

        def report(reader: CorpusReader, tokens: int) -> None:
            nonlocal updated
            now = time.monotonic()
            if now - updated < _INTERVAL:
                return
            updated, seconds = now, now - start
            rates = f"{reader.text_bytes / seconds / 1e6:.1f} MB/s  {tokens / seconds / 1e6:.2f}M tokens/s"
            progress.update(task, total=reader.total_bytes, completed=reader.read_bytes, rates=rates)

        yield report

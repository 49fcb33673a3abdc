"""What the ranks of a run said last: who is slow, and what their time goes to."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from megatron_implicit.telemetry.history import LineReader

COLUMNS = 120
"""Moments a heat map shows."""


_NEEDED = ("time", "attempt", "rank", "busy_s")
"""Numbers without which a line is left out."""


@dataclass
class _Rank:
    reader: LineReader
    lines: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=4 * COLUMNS))


class RankHistory:
    """Reads a run's ranks/ folder as it grows; the newest lines are kept."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "ranks"
        self._ranks: dict[str, _Rank] = {}

    def refresh(self) -> None:
        """Reads what was appended."""
        if self._folder.is_dir():
            for path in self._folder.glob("rank_*.jsonl"):
                if path.name not in self._ranks:
                    self._ranks[path.name] = _Rank(LineReader(path))
        for rank in self._ranks.values():
            anew, lines = rank.reader.new()
            if anew:
                rank.lines.clear()
            rank.lines.extend(line for line in lines if all(isinstance(line.get(key), (int, float)) for key in _NEEDED))

    def heat_map(self) -> dict[str, Any]:
        """Slowness by rank and moment, of the newest attempt.

        Returns:
            ``ranks``: rank, node and stage of every row; ``times``: Unix time of every column; ``slowness``: rows of
            busy time by the median of the same stage at that moment, null where a rank said nothing; ``latest``: each
            rank's newest line.
        """
        newest = max((rank.lines[-1]["attempt"] for rank in self._ranks.values() if rank.lines), default=0)
        rows = [
            [line for line in rank.lines if line["attempt"] == newest][-COLUMNS:] for rank in self._ranks.values()
        ]  # fmt: skip
        rows = sorted((lines for lines in rows if lines), key=lambda lines: lines[-1]["rank"])
        if not rows:
            return {"ranks": [], "times": [], "slowness": [], "latest": []}
        times = [line["time"] for line in max(rows, key=len)]
        busy = [_at(lines, times) for lines in rows]
        stages = [lines[-1].get("stage", 0) for lines in rows]
        return {
            "ranks": [{name: lines[-1].get(name, 0) for name in ("rank", "node", "stage")} for lines in rows],
            "times": times,
            "slowness": slowness(busy, stages),
            "latest": [lines[-1] for lines in rows],
        }


def _at(lines: list[dict[str, Any]], times: list[float]) -> list[Optional[float]]:
    """Busy time at each moment: the line nearest to it, in order."""
    width = max((b - a for a, b in zip(times, times[1:])), default=60.0)
    values: list[Optional[float]] = []
    index = 0
    for moment in times:
        while index + 1 < len(lines) and abs(lines[index + 1]["time"] - moment) <= abs(lines[index]["time"] - moment):
            index += 1
        near = abs(lines[index]["time"] - moment) <= width
        values.append(lines[index]["busy_s"] if near else None)
    return values


def slowness(busy: list[list[Optional[float]]], stages: list[int]) -> list[list[Optional[float]]]:
    """Busy times [ranks][moments] by the median of the rank's stage at the moment."""
    result: list[list[Optional[float]]] = [[None] * len(row) for row in busy]
    for stage in set(stages):
        members = [index for index, own in enumerate(stages) if own == stage]
        for moment in range(len(busy[0])):
            known = [busy[index][moment] for index in members if busy[index][moment]]
            median = statistics.median(known) if known else None
            for index in members:
                value = busy[index][moment]
                if median and value is not None:
                    result[index][moment] = round(value / median, 4)
    return result

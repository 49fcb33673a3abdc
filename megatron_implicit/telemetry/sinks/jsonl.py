"""Lines of JSON: metrics.jsonl of the run, and a file for each rank."""

from __future__ import annotations

import time
from typing import Any, Optional

from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.sinks.base import Identity, Sink


class MetricsFileSink(Sink):
    """metrics.jsonl. Lines that find no room on the disk wait for it."""

    name = "metrics.jsonl"
    rests, essential = False, True

    def __init__(self, file: LineFile) -> None:
        self._file = file

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
        if metrics is not None:
            self._file.write(metrics)

    def close(self) -> None:
        self._file.close()


class RankFileSink(Sink):
    """ranks/rank_00000.jsonl: what one rank's time went to, means over some seconds."""

    name = "ranks/"

    def __init__(self, identity: Identity, every_s: float) -> None:
        self._identity, self._every_s = identity, every_s
        self._file = LineFile(identity.run_dir / "ranks" / f"rank_{identity.rank:05}.jsonl")
        self._sums: dict[str, float] = {}
        self._steps, self._step, self._due = 0, 0, 0.0

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
        if not rank:
            return
        self._step = rank["step"]
        self._steps += 1
        for name, value in rank.items():
            if name != "step" and value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        if not self._steps:
            return
        identity = self._identity
        means = {name: float(f"{total / self._steps:.6g}") for name, total in self._sums.items()}
        line = {
            "time": round(time.time(), 3), "step": self._step, "steps": self._steps, "attempt": identity.attempt,
            "rank": identity.rank, "node": identity.node, "stage": identity.stage, **means,
        }  # fmt: skip
        self._sums, self._steps, self._due = {}, 0, time.monotonic() + self._every_s
        self._file.write(line)

    def close(self) -> None:
        self.flush()
        self._file.close()

"""metrics.jsonl: one JSON object a step, appended and flushed; steps redone after a crash append again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends lines to a run's metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        """One line, on its way to disk when this returns."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The last line of every step, in order of steps; a line torn by a crash is left out."""
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            steps[entry["step"]] = entry
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return [steps[step] for step in sorted(steps)]

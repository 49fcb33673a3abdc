"""metrics.jsonl: one JSON object a step, appended whole; steps redone after a crash append again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_implicit.errors import DataError


class MetricsWriter:
    """Appends lines to a run's metrics.jsonl.

    A line reaches the file in one write, so a killed job tears at most its last one; the next writer closes that line.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)
        if _ends_in_a_line(path):
            return
        self._file.write(b"\n")

    def write(self, metrics: dict[str, Any]) -> None:
        """One line, in the file when this returns. Numbers that are not finite become null: JSON has none."""
        values = {name: None if _is_not_finite(value) else value for name, value in metrics.items()}
        self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The last line of every step, in order of steps; a line torn by a crash is left out.

    Raises:
        DataError: there is no such file.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run writes it with its first step") from None
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            steps[entry["step"]] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return [steps[step] for step in sorted(steps)]


def _ends_in_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)

"""metrics.jsonl: one JSON object a step, appended by ``LineFile``; steps redone after a crash append again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_implicit.errors import DataError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The last line of every step, in order of steps; a line torn by a crash is left out.

    Raises:
        DataError: there is no such file.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a run writes it with its first step") from None
    return _last_of_each_step(lines)


def last_metrics(path: Path, size: int) -> list[dict[str, Any]]:
    """As ``read_metrics``, of the last ``size`` bytes of the file; nothing where there is no file."""
    try:
        with open(path, "rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(begin)
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    return _last_of_each_step(lines[1:] if begin else lines)


def _last_of_each_step(lines: list[bytes]) -> list[dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            steps[entry["step"]] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return [steps[step] for step in sorted(steps)]

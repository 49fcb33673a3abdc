"""The runs under a folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, Iterator

from megatron_implicit.telemetry.history import RunHistory
from megatron_implicit.telemetry.rank_history import RankHistory

DEPTH = 4
"""Folders below the root in which runs are looked for."""
SKIPPED = {"checkpoints", "plots", "logs", "ranks", "tensorboard", "wandb", "data", "cache"}
"""Names of folders in which there are none."""


class RunFolders:
    """All runs below a folder, by their path relative to it; new ones are found as they come."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._runs: dict[str, RunHistory] = {}
        self._ranks: dict[str, RankHistory] = {}
        self._lock = threading.Lock()

    def refresh(self) -> dict[str, RunHistory]:
        """Every run, up to date."""
        with self._lock:
            for folder in _runs_below(self.root, DEPTH):
                key = str(folder.relative_to(self.root)) if folder != self.root else folder.resolve().name
                if key not in self._runs:
                    self._runs[key] = RunHistory(folder)
            for history in self._runs.values():
                history.refresh()
            return dict(self._runs)

    def run(self, key: str) -> RunHistory:
        """One run, up to date.

        Raises:
            KeyError: there is none of that name.
        """
        with self._lock:
            if key in self._runs:
                self._runs[key].refresh()
                return self._runs[key]
        return self.refresh()[key]

    def ranks(self, key: str) -> RankHistory:
        """What a run's ranks said, up to date."""
        history = self.run(key)
        with self._lock:
            ranks = self._ranks.setdefault(key, RankHistory(history.run_dir))
            ranks.refresh()
            return ranks


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file():
        yield folder
        return
    if depth == 0:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir() and entry.name not in SKIPPED and not entry.name.startswith("."):
            yield from _runs_below(Path(entry.path), depth - 1)


def config_difference(configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Keys in which configurations differ: ``key`` and ``values`` by run; curricula by phase."""
    flat = {name: dict(_flatten(config)) for name, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = [{"key": key, "values": {name: values.get(key) for name, values in flat.items()}} for key in keys]
    return [row for row in rows if len({repr(value) for value in row["values"].values()}) > 1]


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value); items of a list are named by their number, or by their own name if they have one."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {item.get("name", str(index)): item for index, item in enumerate(values)}
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flatten(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, values

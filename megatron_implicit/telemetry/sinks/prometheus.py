"""Prometheus: one exporter a node serves the numbers of all its ranks and registers itself as a target.

A rank writes its current numbers into a small file in the node's memory; the exporter, in the node's first process,
reads those files when it is asked. Nothing is computed for Prometheus in between.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

from megatron_implicit.config import TelemetryConfig
from megatron_implicit.telemetry.catalogue import RANK_METRICS, RUN_METRICS
from megatron_implicit.telemetry.sinks.base import Identity, Sink
from megatron_implicit.telemetry.sinks.targets import Target

DISK_EVERY_S = 10.0
"""Seconds between looks at the file system."""


class PrometheusSink(Sink):
    """This rank's part of the node's exporter."""

    name = "the Prometheus exporter"

    def __init__(self, config: TelemetryConfig, identity: Identity) -> None:
        self._identity = identity
        self._folder = _node_folder(identity)
        self._exporter: Any = None
        self._port = config.prometheus_port
        self._target = Target(Path(config.targets_dir), identity)
        self._values: dict[str, float] = {}
        self._totals: dict[str, float] = {"steps": 0.0}
        self._of_disk: dict[str, float] = {}
        self._skipped, self._look_at_disk = 0, 0.0

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._write()
        if self._identity.local_rank == 0:
            self._start_exporter()

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
        if not rank:
            return
        self._totals["steps"] += 1
        for name, value in rank.items():
            if name.endswith("_s") and name in RANK_METRICS and name != "rank_tokens_per_s":
                total = name.removesuffix("_s") + "_seconds"
                self._totals[total] = self._totals.get(total, 0.0) + value
        self._values = {name: _number(value) for name, value in rank.items() if name in RANK_METRICS}
        if metrics is not None:
            self._values |= {name: _number(value) for name, value in metrics.items() if name in RUN_METRICS}
            self._skipped += bool(metrics.get("skipped"))
            self._values |= {"skipped_steps": self._skipped, **self._look_around()}
        self._values["last_step_time"] = time.time()
        self._write(metrics.get("phase") if metrics else None)
        if self._exporter is not None and not self._exporter.alive:
            self._start_exporter()
            raise RuntimeError("its server had stopped and was started again")

    def close(self) -> None:
        if self._exporter is not None:
            self._target.remove()
            self._exporter.stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start_exporter(self) -> None:
        from megatron_implicit.telemetry.sinks.exporter import Exporter  # prometheus_client, only where it is used

        self._exporter = Exporter(self._folder, self._port)
        self._port = self._exporter.port
        self._target.register(self._port)

    def _write(self, phase: Optional[str] = None) -> None:
        """Whole or not at all: the exporter may read at any time."""
        identity = self._identity
        content = {"labels": identity.labels, "values": self._values, "totals": self._totals, "phase": phase}
        partial = self._folder / f".{identity.rank}"
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, self._folder / f"{identity.rank}.json")

    def _look_around(self) -> dict[str, float]:
        """Disk and checkpoints, now and then."""
        if time.monotonic() >= self._look_at_disk:
            self._look_at_disk = time.monotonic() + DISK_EVERY_S
            usage = shutil.disk_usage(self._identity.run_dir)
            self._of_disk = {"disk_free_bytes": usage.free, "disk_free_fraction": usage.free / usage.total}
            latest = self._identity.run_dir / "checkpoints" / "latest"
            if latest.is_file():
                self._of_disk["checkpoint_time"] = latest.stat().st_mtime
        return self._of_disk


def _node_folder(identity: Identity) -> Path:
    """The same on all ranks of a job on a node, and no other job's."""
    shared_memory = Path("/dev/shm")
    base = shared_memory if os.access(shared_memory, os.W_OK) else Path(tempfile.gettempdir())
    job = f"{identity.run_dir.resolve()}|{identity.node}|{identity.job}|{identity.attempt}"
    return base / f"megatron_implicit-{os.getuid()}-{hashlib.sha1(job.encode()).hexdigest()[:16]}"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)

"""Runs that were never made: folders, rank files and exporters of many ranks, as real jobs leave and serve them."""

from __future__ import annotations

import functools
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from megatron_implicit.config import Config, TelemetryConfig, config_from_dict, config_to_dict
from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.sinks.base import Identity
from megatron_implicit.telemetry.sinks.prometheus import PrometheusSink
from megatron_implicit.telemetry.timing import PARTS

SHARES = {
    "data_wait": 0.01, "forward": 0.06, "solve": 0.42, "phantom": 0.12, "backward": 0.25, "optimizer": 0.04,
    "communication": 0.10,
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def _base_config() -> Config:
    return config_from_dict(
        {
            "model": {"family": "implicit_mamba2", "size": "130m"},
            "curriculum": [
                {"name": "bounded", "start": 0.0, "max_iterations": 4, "phantom_steps": 1, "tolerance": 0.0},
                {"name": "free", "start": 0.25},
            ],
            "train": {"steps": 1000, "global_batch_size": 64, "micro_batch_size": 4},
        }
    )


@dataclass
class SimulatedRun:
    """A run of ``ranks`` ranks on nodes of ``per_node``, one of which may be slow."""

    folder: Path
    steps: int = 400
    planned_steps: int = 1000
    ranks: int = 4
    per_node: int = 2
    slow_rank: int | None = None
    slow_by: float = 1.6
    step_s: float = 0.5
    seed: int = 0
    restart_at: int | None = None
    """A step at which the job was killed; it went on 20 steps earlier, a minute later."""
    settings: dict[str, Any] = field(default_factory=dict)
    began: float | None = None
    """Unix time of the first step; None lets the last one be now."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.name = self.folder.name
        self.config = config_to_dict(_base_config())
        self.config["train"]["steps"] = self.planned_steps
        self.config["run"] = {"name": self.name, "dir": str(self.folder)}
        for section, values in self.settings.items():
            self.config[section] |= values

    def write(self) -> None:
        """The run's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config), encoding="utf-8")
        length = self.steps * self.step_s + (60.0 if self.restart_at is not None else 0.0)
        began = time.time() - length if self.began is None else self.began
        metrics, events = [], LineFile(self.folder / "events.jsonl")
        self._event(events, began - 5, 0, 0, "start", f"new run in {self.name}")
        gap, attempt = 0.0, 0
        for step in self._step_order():
            now = began + step * self.step_s + gap
            if self.restart_at is not None and attempt == 0 and step < self._last_made:
                attempt, gap, now = 1, 60.0, now + 60.0
                self._event(events, now - 5, step - 1, 1, "resume", f"from step {step - 1}")
            metrics.append(self.metrics(step, now, attempt))
            if step % 100 == 0:
                self._event(events, now, step, attempt, "checkpoint", f"step_{step:08}")
            self._last_made = step
        (self.folder / "metrics.jsonl").write_bytes(b"\n".join(map(orjson.dumps, metrics)) + b"\n")
        events.close()
        self._write_ranks(began, gap, attempt)

    def metrics(self, step: int, now: float, attempt: int) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        noise = self._random.gauss
        free = step > self.planned_steps * 0.25
        evaluations = 4.0 if not free else 7 + 2 * math.exp(-step / 300) + noise(0, 0.25)
        residual = (0.09 if not free else 0.038) * math.exp(noise(0, 0.08))
        line = {
            "step": step, "time": now, "attempt": attempt, "ranks": self.ranks, "tokens": step * 64 * 256,
            "loss": 2.4 + 8.0 * (step + 8) ** -0.45 + noise(0, 0.05), "grad_norm": math.exp(noise(-0.4, 0.25)),
            "learning_rate": 1e-3 * min(1, step / 30), "phase": "free" if free else "bounded",
            "iterations_mean": evaluations - 0.4, "evaluations_mean": evaluations,
            "evaluations_p50": round(evaluations),
            "evaluations_p99": round(evaluations) + (4 if free else 0),
            "evaluations_max": round(evaluations) + (9 if free else 0), "evaluations_skew": abs(noise(0, 0.5)),
            "residual_mean": residual, "residual_p50": 0.9 * residual, "residual_p90": 1.2 * residual,
            "residual_p99": 1.5 * residual, "residual_max": 2.2 * residual,
            "unconverged_fraction": max(0.0, noise(0.03, 0.02)) if free else None,
            "token_residual_p50": residual / 2, "token_residual_p99": 3 * residual, "token_residual_p100": 9 * residual,
            "step_time_s": self.step_s,
            "tokens_per_s": 64 * 256 / self.step_s * (4 / evaluations) * (1 + noise(0, 0.02)),
            "model_flops_per_s": 3.1e14 * (1 + noise(0, 0.01)), "mfu": 0.313 * (1 + noise(0, 0.01)),
            "memory_bytes": 5.1e10,
        }  # fmt: skip
        if step % 50 == 0:
            line["validation_loss"] = 2.45 + 8.0 * (step + 8) ** -0.45
        return line | {f"time_{part}_s": share * self.step_s * (1 + noise(0, 0.03)) for part, share in SHARES.items()}

    def rank_line(self, rank: int, step: int) -> dict[str, Any]:
        """What a rank says of a step, as sinks get it."""
        slow = self.slow_by if rank == self.slow_rank else 1.0
        parts = {part: share * self.step_s * (1 + self._random.gauss(0, 0.02)) for part, share in SHARES.items()}
        for part in ("solve", "phantom", "backward", "forward"):
            parts[part] *= slow
        longest = self.step_s * (0.9 * (self.slow_by if self.slow_rank is not None else 1.0) + 0.1)
        busy = sum(parts[part] for part in PARTS if part != "communication")
        parts["communication"] = max(0.01, longest - busy)
        return {
            "step": step, "step_s": busy + parts["communication"], "busy_s": busy, "rank_memory_bytes": 5.1e10,
            "rank_tokens_per_s": 64 * 256 / self.step_s / self.ranks, "own_evaluations_mean": 7.0,
            **{f"{part}_s": seconds for part, seconds in parts.items()},
        }  # fmt: skip

    def node_of(self, rank: int) -> str:
        """The rank's node."""
        return f"{self.name}-node{rank // self.per_node:02}"

    def _step_order(self) -> list[int]:
        self._last_made = 0
        if self.restart_at is None:
            return list(range(1, self.steps + 1))
        return [*range(1, self.restart_at + 1), *range(self.restart_at - 19, self.steps + 1)]

    def _write_ranks(self, began: float, gap: float, attempt: int) -> None:
        every = max(1, self.steps // 100)
        (self.folder / "ranks").mkdir()
        for rank in range(self.ranks):
            place = {"rank": rank, "node": self.node_of(rank), "stage": 0, "attempt": attempt, "steps": every}
            lines = [
                {"time": began + step * self.step_s + gap, **self.rank_line(rank, step), **place}
                for step in range(every, self.steps + 1, every)
            ]
            (self.folder / "ranks" / f"rank_{rank:05}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)) + b"\n")

    @staticmethod
    def _event(file: LineFile, now: float, step: int, attempt: int, kind: str, message: str) -> None:
        file.write({"time": now, "step": step, "attempt": attempt, "kind": kind, "rank": 0, "message": message})


class LiveRun:
    """A simulated run that makes steps while a test looks: real exporters, real files.

    Args:
        run: written already.
        targets: folder of the exporters' registrations; None exports nothing.
    """

    def __init__(self, run: SimulatedRun, targets: Path | None) -> None:
        self.run, self.step = run, run.steps
        self._metrics = LineFile(run.folder / "metrics.jsonl")
        self._sinks = [self._sink(rank, targets) for rank in range(run.ranks)] if targets else []
        for sink in self._sinks:
            sink.open()

    def advance(self) -> None:
        """One more step, now."""
        self.step += 1
        line = self.run.metrics(self.step, time.time(), 1 if self.run.restart_at else 0)
        self._metrics.write(line)
        for rank, sink in enumerate(self._sinks):
            sink.step(line if rank == 0 else None, self.run.rank_line(rank, self.step))

    def close(self) -> None:
        """The job ends."""
        for sink in self._sinks:
            sink.close()
        self._metrics.close()

    def _sink(self, rank: int, targets: Path) -> PrometheusSink:
        run = self.run
        identity = Identity(
            run=run.name, run_id=f"{run.name}-id", run_dir=run.folder, job="4242", node=run.node_of(rank), rank=rank,
            local_rank=rank % run.per_node, stage=0, attempt=0,
        )  # fmt: skip
        return PrometheusSink(TelemetryConfig(prometheus=True, targets_dir=str(targets)), identity)

"""Weights & Biases, online or offline; every job of a run continues one wandb run."""

from __future__ import annotations

import os
from typing import Any, Optional

from megatron_implicit.config import TelemetryConfig
from megatron_implicit.telemetry.catalogue import RUN_METRICS
from megatron_implicit.telemetry.metrics_file import last_metrics
from megatron_implicit.telemetry.sinks.base import Identity, Sink

TOLD_AGAIN_BYTES = 512 * 1024
"""Of metrics.jsonl: more steps than wandb keeps to itself (32 KiB)."""
CONNECT_S = 60.0
"""Seconds that reaching the server may take, unless wandb's own WANDB_INIT_TIMEOUT says otherwise. A run that ends
before waits for them."""


class WandbSink(Sink):
    """The job's numbers by step. The run's id makes one curve of all jobs; ``attempt`` and the events mark where one
    took over from another. A job that was killed takes with it what wandb had not written: the job that goes on tells
    the last steps before its own again. Offline runs reach the server with ``wandb sync --append``."""

    name = "wandb"

    def __init__(self, config: TelemetryConfig, identity: Identity) -> None:
        self._config, self._identity = config, identity
        self._run: Any = None

    def open(self) -> None:
        import wandb

        identity = self._identity
        os.environ.setdefault("WANDB_SILENT", "true")
        connect_s = float(os.environ.get("WANDB_INIT_TIMEOUT", CONNECT_S))
        self._run = wandb.init(
            project=self._config.wandb_project,
            id=identity.run_id,
            name=identity.run,
            dir=str(identity.run_dir),
            mode=self._config.wandb,
            resume="allow",
            config=identity.config,
            settings=wandb.Settings(
                init_timeout=connect_s, console="off", disable_git=True, disable_code=True, silent=True
            ),
        )
        # Our own step: wandb's only grows, and would leave out the steps that are made again after a crash.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if identity.attempt:
            for line in last_metrics(identity.run_dir / "metrics.jsonl", TOLD_AGAIN_BYTES):
                if line["step"] < identity.first_step:
                    self.step(line, {})

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
        if metrics is not None:
            chosen = {
                name: value for name, value in metrics.items()
                if value is not None and (name in RUN_METRICS or name.startswith("time_") or name == "phase")
            }  # fmt: skip
            self._run.log(chosen)

    def event(self, event: dict[str, Any]) -> None:
        text = f"attempt {event['attempt']}, rank {event['rank']}: {event['message']}"
        self._run.log({"step": event["step"], f"event/{event['kind']}": 1, "event/text": f"{event['kind']}: {text}"})

    def close(self) -> None:
        self._run.finish()

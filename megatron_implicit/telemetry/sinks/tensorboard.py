"""TensorBoard event files in the run's tensorboard/ folder."""

from __future__ import annotations

from typing import Any, Optional

from megatron_implicit.telemetry.catalogue import RUN_METRICS
from megatron_implicit.telemetry.sinks.base import Identity, Sink


class TensorBoardSink(Sink):
    """Scalars of the job by step, events as text. A resumed job continues the curves: what an earlier job wrote of
    the steps that are made again is hidden."""

    name = "TensorBoard"

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._writer: Any = None

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._identity.run_dir / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=self._identity.first_step)

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
        if metrics is None:
            return
        for name, value in metrics.items():
            if name != "step" and (name in RUN_METRICS or name.startswith("time_")) and value is not None:
                tag = name.replace("time_", "time/", 1)
                self._writer.add_scalar(tag, value, metrics["step"], walltime=metrics["time"])

    def event(self, event: dict[str, Any]) -> None:
        text = f"**{event['kind']}** (attempt {event['attempt']}, rank {event['rank']}): {event['message']}"
        self._writer.add_text("events", text, event["step"], walltime=event["time"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

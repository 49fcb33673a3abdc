"""Where a run's numbers go: one sink a file, none of which can harm the run.

``base`` has the interface; ``thread`` feeds each sink on a thread of its own and survives its failures;
``standard_sinks`` opens what ``telemetry.*`` asks for. metrics.jsonl is always written, by rank 0.
"""

from __future__ import annotations

from megatron_implicit.config import TelemetryConfig
from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.sinks.base import Identity, Sink
from megatron_implicit.telemetry.sinks.jsonl import MetricsFileSink, RankFileSink
from megatron_implicit.telemetry.sinks.prometheus import PrometheusSink
from megatron_implicit.telemetry.sinks.tensorboard import TensorBoardSink
from megatron_implicit.telemetry.sinks.thread import SinkThreads
from megatron_implicit.telemetry.sinks.weights_and_biases import WandbSink

__all__ = ["Identity", "Sink", "SinkThreads", "standard_sinks"]


def standard_sinks(config: TelemetryConfig, identity: Identity, metrics_file: LineFile) -> list[Sink]:
    """This rank's sinks, not opened yet; rank 0 writes the metrics file."""
    sinks: list[Sink] = []
    if identity.rank == 0:
        sinks.append(MetricsFileSink(metrics_file))
    if config.rank_file_every_s > 0:
        sinks.append(RankFileSink(identity, config.rank_file_every_s))
    if config.prometheus:
        sinks.append(PrometheusSink(config, identity))
    if identity.rank == 0 and config.tensorboard:
        sinks.append(TensorBoardSink(identity))
    if identity.rank == 0 and config.wandb != "off":
        sinks.append(WandbSink(config, identity))
    return sinks

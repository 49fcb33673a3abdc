"""The HTTP server that Prometheus asks: the numbers of all ranks of a node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from megatron_implicit.telemetry.catalogue import RANK_METRICS, RUN_METRICS

PREFIX = "megatron_implicit_"
LABELS = ("run", "job", "node", "rank", "stage")
_MEANINGS = {name: f"{m.meaning}{f' [{m.unit}]' if m.unit else ''}" for name, m in (RUN_METRICS | RANK_METRICS).items()}


class Exporter:
    """Serves /metrics on every interface.

    Args:
        folder: has RANK.json of every rank of the node.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, folder: Path, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(_NodeCollector(folder))
        self._server, self._thread = start_http_server(port, registry=registry)
        self.port: int = self._server.server_port

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()


class _NodeCollector(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> list[Any]:
        return []  # what there is depends on the model

    def collect(self) -> Iterator[Any]:
        gauges: dict[str, GaugeMetricFamily] = {}
        counters: dict[str, CounterMetricFamily] = {}
        phases = GaugeMetricFamily(f"{PREFIX}phase", "1 for the phase the run is in.", labels=(*LABELS, "phase"))
        for path in sorted(self._folder.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            labels = [content["labels"][name] for name in LABELS]
            for name, value in content["values"].items():
                family = gauges.setdefault(
                    name, GaugeMetricFamily(PREFIX + name, _MEANINGS.get(name, name.replace("_", " ")), labels=LABELS)
                )
                family.add_metric(labels, value)
            for name, value in content["totals"].items():
                family = counters.setdefault(
                    name, CounterMetricFamily(PREFIX + name, f"{name.replace('_', ' ')} of this job", labels=LABELS)
                )
                family.add_metric(labels, value)
            if content["phase"]:
                phases.add_metric([*labels, content["phase"]], 1)
        yield from gauges.values()
        yield from counters.values()
        yield phases

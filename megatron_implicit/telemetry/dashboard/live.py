"""What Prometheus knows now: nodes, alerts, ranks, and runs whose folder is on another machine."""

from __future__ import annotations

import math
import time
from typing import Any, Optional

from megatron_implicit.telemetry.dashboard.panels import SERIES
from megatron_implicit.telemetry.dashboard.prometheus import PrometheusClient
from megatron_implicit.telemetry.rank_history import COLUMNS
from megatron_implicit.telemetry.timing import PARTS

PREFIX = "megatron_implicit_"
WINDOW_S = 600.0
"""Seconds a live heat map looks back."""
CURVE_S = 24 * 3600.0
"""Seconds the curves of a run without a folder look back."""


class LiveView:
    """Tables and curves made of a Prometheus' answers; empty where it does not answer."""

    def __init__(self, client: PrometheusClient) -> None:
        self._client = client

    def nodes(self) -> list[dict[str, Any]]:
        """A row for each exporter: run, node, whether it answers, ranks, throughput, its slowest rank."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for labels, up in self._vector('up{run!=""}'):
            key = (labels["run"], labels["node"])
            rows[key] = {"run": key[0], "node": key[1], "job": labels.get("job"), "up": up > 0, "ranks": 0}
        for labels, value in self._vector(f"count by (run, node) ({PREFIX}busy_s)"):
            self._row(rows, labels)["ranks"] = int(value)
        for name, expression in (
            ("tokens_per_s", f"sum by (run, node) ({PREFIX}rank_tokens_per_s)"),
            ("memory_bytes", f"max by (run, node) ({PREFIX}rank_memory_bytes)"),
            ("data_wait_s", f"max by (run, node) ({PREFIX}data_wait_s)"),
        ):
            for labels, value in self._vector(expression):
                self._row(rows, labels)[name] = _finite(value)
        for labels, value in self._vector("topk by (run, node) (1, megatron_implicit:slowness)"):
            self._row(rows, labels)["slowness"] = _finite(value)
            self._row(rows, labels)["slowest"] = labels.get("rank")
        return [rows[key] for key in sorted(rows)]

    def alerts(self) -> list[dict[str, Any]]:
        """Firing alerts first."""
        rows = [
            {
                "name": alert["labels"].get("alertname"), "severity": alert["labels"].get("severity"),
                "run": alert["labels"].get("run"), "node": alert["labels"].get("node"),
                "rank": alert["labels"].get("rank"), "state": alert["state"], "since": alert.get("activeAt"),
                "summary": alert["annotations"].get("summary", ""), "remedy": alert["annotations"].get("remedy", ""),
            }
            for alert in self._client.alerts()
        ]  # fmt: skip
        return sorted(rows, key=lambda row: (row["state"] != "firing", row["name"], row["run"] or ""))

    def runs(self) -> dict[str, dict[str, Any]]:
        """Current numbers of every run, by name."""
        rows: dict[str, dict[str, Any]] = {}
        for labels, value in self._vector('{__name__=~"megatron_implicit_.+", rank="0"}'):
            row = rows.setdefault(labels["run"], {"name": labels["run"]})
            name = labels["__name__"].removeprefix(PREFIX)
            if name == "phase":
                row["phase"] = labels.get("phase")
            else:
                row[name] = _finite(value)
        return rows

    def curves(self, run: str) -> dict[str, list[Any]]:
        """Curves of a run over its last day, as ``RunHistory.curves`` has them."""
        now = time.time()
        names = "|".join(PREFIX + key for key in ("step", *SERIES))
        series = self._client.query_range(
            f'{{__name__=~"{names}", run={_quoted(run)}, rank="0"}}', now - CURVE_S, now, CURVE_S / 1500
        )
        by_key = {item["metric"]["__name__"].removeprefix(PREFIX): dict(map(tuple, item["values"])) for item in series}
        steps = by_key.get("step", {})
        times = sorted(steps)
        columns = {key: [_finite(values.get(moment, "NaN")) for moment in times] for key, values in by_key.items()}
        return columns | {"step": [int(float(steps[moment])) for moment in times], "time": times}

    def heat_map(self, run: str) -> dict[str, Any]:
        """As ``RankHistory.heat_map``."""
        now = time.time()
        series = self._client.query_range(
            f"megatron_implicit:slowness{{run={_quoted(run)}}}", now - WINDOW_S, now, WINDOW_S / COLUMNS
        )
        series.sort(key=lambda item: int(item["metric"]["rank"]))
        times = sorted({moment for item in series for moment, _ in item["values"]})
        latest = self._latest(run)
        ranks, rows = [], []
        for item in series:
            labels, values = item["metric"], dict(map(tuple, item["values"]))
            ranks.append({"rank": int(labels["rank"]), "node": labels["node"], "stage": int(labels["stage"])})
            rows.append([_finite(values.get(moment, "NaN")) for moment in times])
        empty: dict[str, Any] = {}
        return {"ranks": ranks, "times": times, "slowness": rows,
                "latest": [latest.get(rank["rank"], empty) | rank for rank in ranks]}  # fmt: skip

    def _latest(self, run: str) -> dict[int, dict[str, Any]]:
        names = "|".join(f"{PREFIX}{name}_s" for name in (*PARTS, "busy", "step"))
        rows: dict[int, dict[str, Any]] = {}
        for labels, value in self._vector(f'{{__name__=~"{names}", run={_quoted(run)}}}'):
            rows.setdefault(int(labels["rank"]), {})[labels["__name__"].removeprefix(PREFIX)] = _finite(value)
        return rows

    def _vector(self, expression: str) -> list[tuple[dict[str, str], float]]:
        return [(item["metric"], float(item["value"][1])) for item in self._client.query(expression)]

    @staticmethod
    def _row(rows: dict[tuple[str, str], dict[str, Any]], labels: dict[str, str]) -> dict[str, Any]:
        key = (labels["run"], labels["node"])
        return rows.setdefault(key, {"run": key[0], "node": key[1], "up": True, "ranks": 0})


def _finite(value: Any) -> Optional[float]:
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) and abs(number) < 1e9 else (
        number if math.isfinite(number) else None
    )  # fmt: skip


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

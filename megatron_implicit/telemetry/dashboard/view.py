"""What the page asks for: runs on disk and Prometheus' knowledge put together."""

from __future__ import annotations

import time
from typing import Any, Optional

from megatron_implicit.telemetry.dashboard.live import LiveView
from megatron_implicit.telemetry.dashboard.panels import SERIES, described_panels
from megatron_implicit.telemetry.dashboard.prometheus import PrometheusClient
from megatron_implicit.telemetry.dashboard.runs import RunFolders, config_difference

POINTS = 1500
"""Rows of a curve that is drawn: more than a screen has pixels for."""
REMOTE = "prometheus:"
"""Before the name of a run that only Prometheus knows."""


class Dashboard:
    """Answers of the page's API; every method's result is JSON.

    Args:
        folders: runs on disk.
        client: of a Prometheus; None where there is none.
    """

    def __init__(self, folders: RunFolders, client: Optional[PrometheusClient] = None) -> None:
        self._folders, self._client = folders, client
        self._live = LiveView(client) if client else None

    def panels(self) -> dict[str, Any]:
        """What is drawn, and what it means."""
        return described_panels()

    def overview(self) -> dict[str, Any]:
        """All runs, nodes and alerts."""
        runs = [{"id": key, **history.summary()} for key, history in self._folders.refresh().items()]
        live = self._live.runs() if self._live else {}
        names = {run["name"] for run in runs}
        runs += [_remote_row(row) for name, row in live.items() if name not in names]
        order = {"running": 0, "stalled": 1, "failed": 2, "unreadable": 2}
        runs.sort(key=lambda run: (order.get(run["state"], 3), -(run["time"] or 0)))
        return {
            "time": time.time(),
            "prometheus": self._prometheus_state(),
            "runs": runs,
            "nodes": self._live.nodes() if self._live else [],
            "alerts": self._live.alerts() if self._live else [],
        }

    def run(self, key: str, first: int = 0, last: int = 2**62) -> dict[str, Any]:
        """One run: what it is, curves between two steps, events, alerts.

        Raises:
            KeyError: there is no such run.
        """
        alerts = self._live.alerts() if self._live else []
        if key.startswith(REMOTE):
            name = key.removeprefix(REMOTE)
            row = (self._live.runs() if self._live else {})[name]
            answer = _remote_row(row) | {"phases": [], "attempts": [], "events": []}
            answer["curves"] = self._live.curves(name)
        else:
            history = self._folders.run(key)
            answer = {"id": key, **history.described()}
            keys = [name for name in SERIES if name in history.keys]
            answer["curves"] = history.curves(keys, POINTS, first, last)
        answer["alerts"] = [alert for alert in alerts if alert["run"] == answer["name"]]
        return answer

    def ranks(self, key: str) -> dict[str, Any]:
        """The heat map of a run: Prometheus' where it sees the run now, else that of the run's own files."""
        name = key.removeprefix(REMOTE) if key.startswith(REMOTE) else self._folders.run(key).name
        if self._live:
            answer = self._live.heat_map(name)
            if answer["ranks"]:
                return answer | {"source": "Prometheus"}
        if key.startswith(REMOTE):
            return {"ranks": [], "times": [], "slowness": [], "latest": [], "source": "Prometheus"}
        return self._folders.ranks(key).heat_map() | {"source": "files"}

    def config(self, key: str) -> dict[str, Any]:
        """The resolved configuration of a run on disk."""
        return {"config": {} if key.startswith(REMOTE) else self._folders.run(key).config}

    def compare(self, keys: list[str]) -> dict[str, Any]:
        """Several runs' curves, and the keys in which their configurations differ."""
        runs = [self.run(key) for key in keys]
        configs = {key: self.config(key)["config"] for key in keys}
        return {"runs": runs, "difference": config_difference(configs)}

    def _prometheus_state(self) -> str:
        if self._client is None:
            return "none"
        return "answers" if self._client.reachable else "does not answer"


def _remote_row(row: dict[str, Any]) -> dict[str, Any]:
    """A run that only Prometheus knows, shaped as ``RunHistory.summary``."""
    fields = (
        "phase", "step", "tokens", "tokens_per_s", "mfu", "loss", "evaluations_mean", "evaluations_p99",
        "unconverged_fraction", "model_flops_per_s", "attempt", "step_time_s", "residual_mean", "grad_norm",
        "validation_loss", "memory_bytes",
    )  # fmt: skip
    return {
        "id": REMOTE + row["name"], "name": row["name"], "dir": "", "state": "running", "reason": None, "family": "",
        "size": "", "steps": 0, "eta_s": None, "device_hours": None, "ranks": None, "time": row.get("last_step_time"),
        **{name: row.get(name) for name in fields},
    }  # fmt: skip

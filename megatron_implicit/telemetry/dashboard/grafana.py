"""The page's panels as a Grafana dashboard."""

from __future__ import annotations

from typing import Any

from megatron_implicit.telemetry.catalogue import RUN_METRICS
from megatron_implicit.telemetry.dashboard.panels import PANELS, Panel
from megatron_implicit.telemetry.timing import PARTS

UNITS = {"tokens/s": "short", "FLOP/s": "flops", "share": "percentunit", "s": "s", "bytes": "bytes"}
WIDTH, HEIGHT = 12, 8
"""Of a panel; a row is 24 wide."""
_SOURCE = {"type": "prometheus", "uid": "${source}"}


def grafana_dashboard() -> dict[str, Any]:
    """The JSON that Grafana's import takes (schema 38: Grafana 10 and later)."""
    panels = [_alerts(), *(_curves(panel) for panel in PANELS), _heat_map()]
    for index, panel in enumerate(panels):
        panel |= {"id": index + 1, "datasource": _SOURCE}
        panel["gridPos"] = {"x": WIDTH * (index % 2), "y": HEIGHT * (index // 2), "w": WIDTH, "h": HEIGHT}
    return {
        "title": "megatron_implicit", "uid": "megatron-implicit", "schemaVersion": 38, "editable": True,
        "refresh": "5s", "time": {"from": "now-6h", "to": "now"}, "panels": panels,
        "templating": {"list": [
            {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
            {"name": "run", "label": "run", "type": "query", "datasource": _SOURCE, "refresh": 2, "multi": True,
             "includeAll": True, "query": "label_values(megatron_implicit_step, run)"},
        ]},
    }  # fmt: skip


def _curves(panel: Panel) -> dict[str, Any]:
    described = [RUN_METRICS[key].meaning for key in panel.series if key in RUN_METRICS]
    scale = {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(dict.fromkeys(filter(None, [panel.meaning, *described]))),
        "targets": [
            {"refId": f"{index}", "expr": _expression(key),
             "legendFormat": f"{{{{run}}}} {panel.labels.get(key, '')}".strip()}
            for index, key in enumerate(panel.series)
        ],
        "fieldConfig": {"overrides": [], "defaults": {
            "unit": UNITS.get(panel.unit, "none"), **({"min": 0} if panel.from_zero else {}),
            "custom": {"scaleDistribution": scale, "stacking": {"mode": "normal" if panel.stacked else "none"}},
        }},
    }  # fmt: skip


def _expression(key: str) -> str:
    part = key.removeprefix("time_")
    name = part if part in {f"{name}_s" for name in PARTS} else key
    return f'megatron_implicit_{name}{{run=~"$run", rank="0"}}'


def _heat_map() -> dict[str, Any]:
    return {
        "type": "status-history",
        "title": "Slowness by rank",
        "description": "Busy time of a step (without communication) by the median of the ranks of the same stage.",
        "targets": [
            {"refId": "0", "expr": 'megatron_implicit:slowness{run=~"$run"}',
             "legendFormat": "{{run}} rank {{rank}} {{node}}"}
        ],
        "fieldConfig": {"overrides": [], "defaults": {"decimals": 2, "color": {"mode": "thresholds"}, "thresholds": {
            "mode": "absolute", "steps": [{"color": "green", "value": None}, {"color": "yellow", "value": 1.1},
                                          {"color": "orange", "value": 1.25}, {"color": "red", "value": 1.5}]}}},
    }  # fmt: skip


def _alerts() -> dict[str, Any]:
    return {
        "type": "table",
        "title": "Alerts",
        "description": "Alerts of the shipped rules that fire now.",
        "targets": [
            {"refId": "0", "expr": 'ALERTS{alertstate="firing", run=~"$run"}', "format": "table", "instant": True}
        ],
        "fieldConfig": {"overrides": [], "defaults": {}},
    }

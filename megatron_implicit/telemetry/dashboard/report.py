"""One self-contained HTML file of a run: its page, frozen."""

from __future__ import annotations

import os
import time
from pathlib import Path

import orjson

from megatron_implicit.errors import DataError
from megatron_implicit.telemetry.dashboard.panels import SERIES, described_panels
from megatron_implicit.telemetry.dashboard.server import ASSETS
from megatron_implicit.telemetry.dashboard.view import POINTS
from megatron_implicit.telemetry.history import RunHistory
from megatron_implicit.telemetry.rank_history import RankHistory

STYLES = ("uPlot.min.css", "style.css")
SCRIPTS = ("uPlot.iife.min.js", "format.js", "charts.js", "heatmap.js", "app.js")


def write_report(run_dir: Path, path: Path) -> Path:
    """Writes the report and returns its path. It shows curves, ranks, events and configuration without a network.

    Raises:
        DataError: the run has made no step.
        ConfigError: its config.yaml is damaged.
    """
    history, ranks = RunHistory(run_dir), RankHistory(run_dir)
    history.refresh()
    ranks.refresh()
    if history.damage:
        raise history.damage
    if not history.steps:
        raise DataError(f"{run_dir / 'metrics.jsonl'}: holds no step yet; a report needs at least one")
    keys = [name for name in SERIES if name in history.keys]
    run = {"id": str(run_dir), **history.described(), "alerts": [], "reported": time.time()}
    run["curves"] = history.curves(keys, POINTS)
    answers = {
        "panels": described_panels(), "run": run, "ranks": ranks.heat_map() | {"source": "files"},
        "config": {"config": history.config},
    }  # fmt: skip
    partial = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(_page(history.name, answers), encoding="utf-8")
    os.replace(partial, path)
    return path


def _page(title: str, answers: dict) -> str:
    page = (ASSETS / "index.html").read_text(encoding="utf-8")
    for name in STYLES:
        page = page.replace(f'<link rel="stylesheet" href="{name}">', f"<style>\n{_asset(name)}</style>")
    data = orjson.dumps(answers, option=orjson.OPT_NON_STR_KEYS).decode()
    data = data.replace("</", "<\\/")  # a "</script>" in a message must not end the script
    for name in SCRIPTS:
        page = page.replace(f'<script src="{name}"></script>', f"<script>\n{_asset(name)}</script>")
    page = page.replace("<script>", f"<script>window.EMBEDDED = {data};</script>\n  <script>", 1)
    return page.replace("<title>megatron_implicit</title>", f"<title>{_escaped(title)}</title>")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")

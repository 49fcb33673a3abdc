"""Watches runs: ``python tools/dashboard.py up``, ``watch RUN``, ``report RUN`` or ``grafana``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command
from megatron_implicit.errors import DataError

DESCRIPTION = """Watch runs.

    python tools/dashboard.py up                    a page of all runs below runs/, at http://127.0.0.1:8700/
    python tools/dashboard.py watch runs/NAME       one run in this terminal
    python tools/dashboard.py report runs/NAME      one HTML file of a run, for a colleague or an archive
    python tools/dashboard.py grafana               the page's panels as JSON for Grafana's import

docs/telemetry.md says more. COMMAND --help lists a command's options.
"""
HELP = {
    "up": "Serve the page; where there is a prometheus binary, it is started too, for alerts and live ranks.",
    "watch": "Show one run live in the terminal, until it ends or Ctrl-C.",
    "report": "Write one HTML file with a run's curves, configuration and events.",
    "grafana": "Print a Grafana dashboard with the page's panels.",
}


def main() -> int:
    """Runs one command."""
    commands = {"up": _up, "watch": _watch, "report": _report, "grafana": _grafana}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        parser = CommandParser(DESCRIPTION)
        parser.add_argument("command", choices=list(commands))
        parser.parse_args(sys.argv[1:2])
    name, arguments = sys.argv[1], sys.argv[2:]
    parser = CommandParser(HELP[name])
    parser.prog = f"{parser.prog} {name}"
    return commands[name](parser, arguments)


def _up(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="folder of the runs (default: runs)")
    parser.add_argument("--targets", metavar="FOLDER", help="the runs' telemetry.targets_dir (default: RUNS/.targets)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8700, help="port to serve at; 0 takes a free one (default: 8700)")
    parser.add_argument("--prometheus", metavar="PATH", help="the prometheus binary (default: the one on the PATH)")
    parser.add_argument("--prometheus-url", metavar="URL", help="use a Prometheus that runs already")
    parser.add_argument("--no-prometheus", action="store_true", help="use the runs' files alone")
    parser.add_argument("--storage", metavar="FOLDER", help="Prometheus' database (default: RUNS/.prometheus)")
    parser.add_argument("--retention", default="15d", help="how long Prometheus remembers (default: 15d)")
    parser.add_argument("--scrape-s", type=float, default=5.0, metavar="S", help="seconds between looks (default: 5)")
    options = parser.parse_args(arguments)

    from megatron_implicit.telemetry.dashboard.prometheus import PrometheusClient
    from megatron_implicit.telemetry.dashboard.runs import RunFolders
    from megatron_implicit.telemetry.dashboard.server import DashboardServer
    from megatron_implicit.telemetry.dashboard.view import Dashboard

    root = Path(options.runs)
    if not root.is_dir():
        raise DataError(f"--runs {root}: no such folder; give the one that holds the runs' folders")
    prometheus = None if options.no_prometheus or options.prometheus_url else _start_prometheus(options, root)
    url = options.prometheus_url or (prometheus and prometheus.url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        dashboard = Dashboard(RunFolders(root), PrometheusClient(url) if url else None)
        dashboard.overview()  # reads what there is: the first page need not wait for it
        server = DashboardServer(dashboard, options.host, options.port)
        server.serve_in_background()
        print(f"dashboard: {server.url}\nPrometheus: {url or 'none, the page reads the files of the runs'}", flush=True)
        while True:
            time.sleep(1)
            if prometheus is not None and not prometheus.alive:
                print("warning: Prometheus has ended: alerts are off, the page reads the files of the runs",
                      file=sys.stderr, flush=True)  # fmt: skip
                prometheus = None
    except KeyboardInterrupt:
        return 0
    finally:
        if prometheus is not None:
            prometheus.stop()


def _start_prometheus(options: argparse.Namespace, root: Path):
    from megatron_implicit.telemetry.dashboard.prometheus import Prometheus, PrometheusSettings, find_prometheus

    program = find_prometheus(options.prometheus)
    if program is None:
        print("note: no prometheus on the PATH (Debian: apt-get install prometheus); alerts are off", file=sys.stderr)
        return None
    settings = PrometheusSettings(
        program=program,
        targets=Path(options.targets or root / ".targets"),
        storage=Path(options.storage or root / ".prometheus"),
        scrape_s=options.scrape_s,
        retention=options.retention,
    )
    started = Prometheus(settings)
    started.wait()
    return started


def _watch(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--every-s", type=float, default=1.0, metavar="S", help="seconds between updates (default: 1)")
    parser.add_argument("--once", action="store_true", help="print the present state and end")
    options = parser.parse_args(arguments)

    from megatron_implicit.telemetry.watch import watch

    watch(_run_folder(options.run), options.every_s, once=options.once)
    return 0


def _report(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--output", metavar="FILE", help="default: RUN/report.html")
    options = parser.parse_args(arguments)

    from megatron_implicit.telemetry.dashboard.report import write_report

    run = _run_folder(options.run)
    path = write_report(run, Path(options.output) if options.output else run / "report.html")
    print(path)
    return 0


def _grafana(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    parser.parse_args(arguments)

    from megatron_implicit.telemetry.dashboard.grafana import grafana_dashboard

    print(json.dumps(grafana_dashboard(), indent=1))
    return 0


def _run_folder(name: str) -> Path:
    run = Path(name)
    if not (run / "metrics.jsonl").is_file() and not (run / "config.yaml").is_file():
        raise DataError(f"{run}: no run's folder (it would hold metrics.jsonl); give one below runs/")
    return run


if __name__ == "__main__":
    run_command(main)

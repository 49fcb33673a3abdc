"""tools/dashboard.py as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from megatron_implicit.telemetry.catalogue import RANK_METRICS, RUN_METRICS
from megatron_implicit.telemetry.metrics_file import read_metrics
from tests.telemetry.simulation import SimulatedRun
from tests.tools.conftest import REPOSITORY, Workplace


def test_up_serves_the_page_from_files_alone(work: Workplace) -> None:
    SimulatedRun(work.folder / "runs" / "alpha", steps=20).write()
    SimulatedRun(work.folder / "runs" / "damaged", steps=20).write()
    (work.folder / "runs" / "damaged" / "config.yaml").write_text("")
    command = [sys.executable, str(REPOSITORY / "tools/dashboard.py"), "up", "--port", "0", "--no-prometheus"]
    process = subprocess.Popen(
        command, cwd=work.folder, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    url = process.stdout.readline().split()[1]
    assert "none, the page reads the files of the runs" in process.stdout.readline()
    assert b"megatron_implicit" in urllib.request.urlopen(url).read()
    runs = {run["id"]: run for run in json.load(urllib.request.urlopen(f"{url}api/overview"))["runs"]}
    assert (runs["alpha"]["step"], runs["alpha"]["state"]) == (20, "running")
    assert runs["damaged"]["state"] == "unreadable" and "damaged/config.yaml" in runs["damaged"]["reason"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_watch_shows_curves_ranks_and_events(work: Workplace) -> None:
    SimulatedRun(work.folder / "alpha", ranks=6, slow_rank=4, steps=60).write()
    shown = work.run("dashboard", "watch", "alpha", "--once").stdout
    for words in ("running", "step 60 of 1,000", "evaluations", "█", "slowest of 6 ranks", "new run in alpha"):
        assert words in shown, shown


@pytest.mark.parametrize("columns", ["80", "160"])
def test_what_watch_says_does_not_hang_on_the_width_of_the_terminal(
    work: Workplace, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    run = SimulatedRun(work.folder / "alpha", ranks=6, steps=60)
    run.write()
    losses = [line["loss"] for line in read_metrics(run.folder / "metrics.jsonl")]
    monkeypatch.setenv("COLUMNS", columns)
    shown = work.run("dashboard", "watch", "alpha", "--once").stdout
    row = next(line.split() for line in shown.splitlines() if line.startswith("loss"))
    assert [row[1], *row[-2:]] == [f"{value:.4g}" for value in (losses[-1], min(losses), max(losses))]
    assert all(part in shown.split() for part in ("forward", "solve", "phantom", "backward", "cation")), shown
    assert "…" not in shown and max(map(len, shown.splitlines())) <= int(columns), shown


def test_report_writes_one_file(work: Workplace) -> None:
    SimulatedRun(work.folder / "alpha", steps=20).write()
    done = work.run("dashboard", "report", "alpha", "--output", "out/alpha.html")
    assert (done.returncode, done.stdout) == (0, "out/alpha.html\n"), done.stderr
    assert b"window.EMBEDDED" in (work.folder / "out/alpha.html").read_bytes()


def test_grafana_gets_the_panels_of_the_page(work: Workplace) -> None:
    dashboard = json.loads(work.run("dashboard", "grafana").stdout)
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert {"Loss", "Evaluations of F a solve", "Slowness by rank", "Alerts"} <= set(titles)
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            name = target["expr"].split("{")[0].removeprefix("megatron_implicit_")
            assert name in {*RUN_METRICS, *RANK_METRICS, "ALERTS", "megatron_implicit:slowness"}, target


def test_what_is_missing_is_named(work: Workplace, tmp_path: Path) -> None:
    work.fails("--runs runs: no such folder", "dashboard", "up")
    work.fails("nope: no run's folder", "dashboard", "watch", "nope")
    work.fails("nope: no run's folder", "dashboard", "report", "nope")
    work.fails("invalid choice: 'nope'", "dashboard", "nope", code=2)
    (tmp_path / "runs").mkdir()
    work.fails("--prometheus nope is no program", "dashboard", "up", "--prometheus", "nope")
    SimulatedRun(tmp_path / "alpha", steps=0).write()
    work.fails("holds no step yet", "dashboard", "report", "alpha")
    (tmp_path / "alpha" / "config.yaml").write_text("garbage")
    for command in (("watch", "alpha", "--once"), ("watch", "alpha"), ("report", "alpha")):
        work.fails("alpha/config.yaml cannot be read (it is no mapping)", "dashboard", *command, code=2)

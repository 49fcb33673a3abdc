"""Two jobs on two nodes of a real Slurm, seen live on the page in a real browser; a rank that is slow is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_implicit.telemetry.dashboard.prometheus import PrometheusClient
from tests.launch.conftest import REPOSITORY, SETTINGS
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SubmittedRuns, wait_until
from tests.telemetry.browser import Browser
from tests.telemetry.conftest import browser, page_packages, pictures, prometheus_program  # noqa: F401

pytestmark = pytest.mark.acceptance

PHASES = [{"name": "bounded", "start": 0.0, "max_iterations": 6, "phantom_steps": 1, "tolerance": 0.0}]


@dataclass
class Page:
    """The dashboard's command, running."""

    url: str
    prometheus: str

    def stragglers(self) -> list[dict]:
        """Alerts that name a slow rank."""
        with urllib.request.urlopen(f"{self.url}api/overview", timeout=30) as answer:
            alerts = json.load(answer)["alerts"]
        return [alert for alert in alerts if alert["name"] == "Straggler" and alert["state"] == "firing"]

    def wait_for_a_straggler(self, timeout: float) -> None:
        """Looks once a second: a question takes some of the processors' time, and the ranks need it."""
        deadline = time.monotonic() + timeout
        while not self.stragglers():
            assert time.monotonic() < deadline, self.what_prometheus_knows()
            time.sleep(1.0)

    def what_prometheus_knows(self) -> str:
        """About who is up and how slow."""
        client = PrometheusClient(self.prometheus)
        queries = ("up", "megatron_implicit:slowness", "megatron_implicit:busy_seconds:per_step")
        return "\n".join(f"{query}: {client.query(query)}" for query in queries)


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> SubmittedRuns:
    """Runs that are replicas on two nodes, and too long to end by themselves."""
    settings = {
        "train": {**SETTINGS["train"], "steps": 100_000, "validate_every": 0},
        "checkpoint": {"save_every": 0},
        "curriculum": PHASES,
        "parallel": {"tensor": 1},
        "telemetry": {"console_every": 50, "plots": False, "prometheus": True, "rank_file_every_s": 1.0,
                      "targets_dir": str(tmp_path / "targets")},
    }  # fmt: skip
    return SubmittedRuns(tmp_path, cluster, **settings)


@pytest.fixture
def page(runs: SubmittedRuns, prometheus_program: str) -> Iterator[Page]:  # noqa: F811
    (runs.folder / "runs").mkdir(exist_ok=True)
    command = [
        sys.executable, str(REPOSITORY / "tools" / "dashboard.py"), "up", "--runs", str(runs.folder / "runs"),
        "--targets", str(runs.folder / "targets"), "--port", "0", "--scrape-s", "1", "--prometheus", prometheus_program,
        "--storage", str(runs.folder / "prometheus"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    lines = [process.stdout.readline().split()[1] for _ in range(2)]
    yield Page(*lines)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_two_jobs_are_live_on_the_page_and_a_slow_rank_is_named(
    cluster: Cluster, runs: SubmittedRuns, page: Page, browser: Browser, pictures: Path  # noqa: F811
) -> None:
    (even,) = runs.submit("even")
    (uneven,) = runs.submit("uneven", "--debug.inject", "slow@2:1")
    try:
        for name in ("even", "uneven"):
            wait_until(lambda name=name: made(runs, name) >= 4, 200, f"step 4 of {name}")
        page.wait_for_a_straggler(150)
        (alert,) = page.stragglers()
        assert (alert["run"], alert["rank"], alert["node"]) == ("uneven", "1", "n2")

        browser.open(page.url)
        browser.wait_for_text("rank 1 on n2 holds up uneven")
        assert f"{even}" in browser.text() and f"{uneven}" in browser.text()
        nodes = browser.evaluate("[...document.querySelectorAll('#nodes tbody tr')].map(r => r.innerText)")
        assert sorted(row.split("\t")[:3] for row in nodes) == [
            [node, run, "up"] for node in ("n1", "n2") for run in ("even", "uneven")
        ]  # fmt: skip
        assert looks_drawn(browser.screenshot(pictures / "slurm-overview.png"))
        step = latest_step(browser)
        wait_until(lambda: latest_step(browser) > step, 60, "the page follows by itself", pause=0.5)

        browser.open(f"{page.url}#/run/uneven")
        for text in ("live from Prometheus", "◀ rank 1 on n2"):
            browser.wait_for_text(text)
        assert looks_drawn(browser.screenshot(pictures / "slurm-uneven.png"))
        browser.wait("document.querySelector('#heat canvas').width > 5", 60)
        assert slow_row_is_warmer(browser)
    finally:
        for job in (even, uneven):
            cluster.run("scancel", job)


def made(runs: SubmittedRuns, name: str) -> int:
    """Steps of a run."""
    return max((entry["step"] for entry in runs.entries(name)), default=0)


def latest_step(browser: Browser) -> int:  # noqa: F811
    rows = browser.evaluate("[...document.querySelectorAll('#runs tbody tr')].map(r => r.innerText)")
    return max(int(row.split("/")[0].split()[-1].replace(",", "")) for row in rows)


def looks_drawn(path: Path) -> bool:
    picture = matplotlib.image.imread(path)
    return len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 200


def slow_row_is_warmer(browser: Browser) -> bool:  # noqa: F811
    """Two ranks have no majority whose colour one could stand out from: the slow one's is redder."""
    pixels = browser.evaluate(
        "(() => { const c = document.querySelector('#heat canvas'), d = c.getContext('2d');"
        " return [0, 1].map(i => [...d.getImageData(c.width - 3, Math.floor((i + 0.4) * c.height / 2), 1, 1).data]);"
        " })()"
    )
    even, slow = (pixel[0] - pixel[2] for pixel in pixels)
    return slow - even > 60

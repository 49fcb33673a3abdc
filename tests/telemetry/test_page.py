"""The dashboard's page in a real browser, from the runs' files alone and with a real Prometheus."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_implicit.telemetry.dashboard.prometheus import Prometheus, PrometheusClient, PrometheusSettings
from megatron_implicit.telemetry.dashboard.report import write_report
from megatron_implicit.telemetry.dashboard.runs import RunFolders
from megatron_implicit.telemetry.dashboard.server import DashboardServer
from megatron_implicit.telemetry.dashboard.view import Dashboard
from tests.telemetry.browser import Browser
from tests.telemetry.simulation import LiveRun, SimulatedRun


def serve(root: Path, client: PrometheusClient | None = None) -> DashboardServer:
    server = DashboardServer(Dashboard(RunFolders(root), client), "127.0.0.1", 0)
    server.serve_in_background()
    return server


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one that was killed and resumed and has a slow rank, and one with another learning rate."""
    root = tmp_path_factory.mktemp("runs")
    SimulatedRun(root / "alpha", ranks=16, per_node=8, slow_rank=11, restart_at=230, steps=400).write()
    SimulatedRun(root / "beta", steps=300, seed=1, settings={"optimizer": {"learning_rate": 2e-3}}).write()
    return root


@pytest.fixture(scope="module")
def page(runs: Path) -> Iterator[str]:
    server = serve(runs)
    yield server.url
    server.shutdown()


def test_the_overview_shows_all_runs(browser: Browser, page: str, pictures: Path) -> None:
    browser.open(page)
    text = browser.text()
    assert all(word in text for word in ("alpha", "beta", "400 / 1,000", "300 / 1,000", "running", "free", "MFU"))
    assert "Prometheus: none" in text
    browser.screenshot(pictures / "overview.png")


def test_a_run_s_page_has_curves_phases_restart_and_events(browser: Browser, page: str, pictures: Path) -> None:
    browser.open(f"{page}#/run/alpha")
    text = browser.text()
    assert all(word in text for word in ("Evaluations of F a solve", "Residual of accepted iterates", "Gradient norm"))
    assert "last: gap 51 s, 20 steps again" in text
    assert "attempt 1 makes its first step, 51 s after" in text and "from step 210" in text
    assert browser.evaluate("document.querySelectorAll('.uplot canvas').length") >= 10
    picture = matplotlib.image.imread(browser.screenshot(pictures / "run.png"))
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 500  # it is drawn, not blank


def test_the_straggler_is_a_stripe_in_the_heat_map(browser: Browser, page: str) -> None:
    browser.open(f"{page}#/run/alpha")
    assert "◀ rank 11 on alpha-node01" in browser.text()
    assert striking_rows(browser, 16) == [11]


def striking_rows(browser: Browser, ranks: int) -> list[int]:
    """Rows of the heat map whose colour is far from that of the others."""
    pixels = browser.evaluate(
        "(() => { const c = document.querySelector('#heat canvas'), d = c.getContext('2d'); const rows = [];"
        f" for (let i = 0; i < {ranks}; i++) rows.push([...d.getImageData(0, Math.floor(i * c.height / {ranks}) + 1,"
        " c.width, 1).data]); return rows; })()"
    )
    colours = np.array(pixels, dtype=float).reshape(ranks, -1, 4)[:, :, :3].mean(axis=1)
    distance = np.linalg.norm(colours - np.median(colours, axis=0), axis=1)
    return [int(row) for row in np.flatnonzero(distance > 80)]


def test_numbers_say_what_they_mean_on_hover(browser: Browser, page: str) -> None:
    browser.open(f"{page}#/run/alpha")
    browser.evaluate(
        "[...document.querySelectorAll('.tile [data-tip]')].find(e => e.textContent === 'evaluations').id = 'asked'"
    )
    assert browser.hover("#asked") == "Passes of F without gradient a solve took: what a token costs."
    unexplained = browser.evaluate(
        "[...document.querySelectorAll('section h2 > span:first-child')].filter(e => e.closest('.grid'))"
        ".filter(e => !e.dataset.tip).map(e => e.textContent)"
    )
    assert unexplained == []
    assert "rank" in browser.hover("#heat canvas") and "median" in browser.hover("#heat canvas")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(browser: Browser, page: str, pictures: Path, scheme: str) -> None:
    """WCAG's contrast ratio: 4.5 for text, 3 for curves."""
    browser.prefer(scheme)
    browser.open(f"{page}#/run/alpha")
    card = colour(browser, "--card")
    assert (luminance(card) < 0.1) == (scheme == "dark")
    words = ("--text", "--dim", "--link", "--bad", "--good", "--warn")
    assert all(contrast(colour(browser, name), card) >= 4.5 for name in words)
    assert all(contrast(colour(browser, f"--c{number}"), card) >= 2 for number in range(7))
    browser.screenshot(pictures / f"run-{scheme}.png")
    browser.prefer("light")


def colour(browser: Browser, name: str) -> list[float]:
    text = browser.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()")
    return [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: list[float], second: list[float]) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_runs_are_compared_with_their_configurations(browser: Browser, page: str, pictures: Path) -> None:
    browser.open(f"{page}#/compare/alpha/beta")
    rows = browser.evaluate("[...document.querySelectorAll('#difference tbody tr')].map(r => r.innerText)")
    assert "optimizer.learning_rate\t0.003\t0.002" in rows and len(rows) == 3  # and run.name, run.dir
    browser.screenshot(pictures / "compare.png")


def test_the_page_follows_a_run_that_goes_on(browser: Browser, tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "live", steps=30, ranks=1)
    run.write()
    server = serve(tmp_path)
    browser.open(f"{server.url}#/run/live")
    assert "30\nof 1,000" in browser.text()
    going_on = LiveRun(run, None)
    for _ in range(3):
        going_on.advance()
    browser.wait("document.body.innerText.includes('33\\nof 1,000')", 10)
    server.shutdown()


def test_a_run_with_a_damaged_configuration_says_so_beside_the_others(browser: Browser, tmp_path: Path) -> None:
    for name in ("alpha", "broken"):
        SimulatedRun(tmp_path / name, steps=20).write()
    (tmp_path / "broken" / "config.yaml").write_text("garbage")
    server = serve(tmp_path)
    browser.open(server.url)
    assert all(word in browser.text() for word in ("alpha", "running", "broken", "unreadable"))
    browser.open(f"{server.url}#/run/broken")
    assert "broken/config.yaml cannot be read (it is no mapping)" in browser.text() and "tokens/s" in browser.text()
    server.shutdown()


def test_unknown_questions_are_answered_with_their_name(page: str) -> None:
    for path, words in (("api/run?id=nope", "no run 'nope'"), ("api/nope", "no /api/nope"), ("nope.js", "no nope.js")):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(page + path)
        assert error.value.code == 404 and words in json.load(error.value)["error"]


def test_a_report_needs_nothing_but_itself(browser: Browser, runs: Path, tmp_path: Path, pictures: Path) -> None:
    path = write_report(runs / "alpha", tmp_path / "report.html")
    content = path.read_text(encoding="utf-8")
    assert "src=" not in content.split("window.EMBEDDED")[0] and 'href="style.css"' not in content
    browser.open(path.as_uri())
    text = browser.text()
    assert "Evaluations of F a solve" in text and "from step 210" in text and "learning_rate: 0.003" in text
    assert "◀ rank 11" in text
    browser.screenshot(pictures / "report.png", whole=True)


def test_a_message_cannot_break_out_of_the_report(browser: Browser, tmp_path: Path) -> None:
    run = SimulatedRun(tmp_path / "alpha", steps=3)
    run.write()
    event = {"time": time.time(), "step": 1, "attempt": 0, "rank": 0, "kind": "error"}
    with open(run.folder / "events.jsonl", "a") as file:
        file.write(json.dumps(event | {"message": "</script><script>document.title = 'broken'</script>"}) + "\n")
    browser.open(write_report(run.folder, tmp_path / "report.html").as_uri())
    assert browser.evaluate("document.title") == "alpha"
    assert "</script><script>" in browser.text()


class Moving:
    """Runs that make a step twice a second on a thread."""

    def __init__(self, runs: list[LiveRun]) -> None:
        self._runs, self._stop = runs, threading.Event()
        self._thread = threading.Thread(target=self._move, daemon=True)
        self._thread.start()

    def _move(self) -> None:
        while not self._stop.wait(0.5):
            for run in self._runs:
                run.advance()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for run in self._runs:
            run.close()


def test_256_ranks_of_8_runs_with_prometheus(
    browser: Browser, prometheus_program: str, tmp_path: Path, pictures: Path
) -> None:
    """Loads within 2 s, updates within 1 s, Prometheus within 500 MB; the slow rank is named by the alert."""
    root, targets = tmp_path / "runs", tmp_path / "targets"
    simulated = [
        SimulatedRun(root / f"run-{number}", ranks=32, per_node=8, seed=number, slow_rank=21 if number == 3 else None)
        for number in range(8)
    ]
    for run in simulated:
        run.write()
    settings = PrometheusSettings(prometheus_program, targets, tmp_path / "prometheus", scrape_s=1.0)
    prometheus = Prometheus(settings)
    moving = Moving([LiveRun(run, targets) for run in simulated])
    server = None
    try:
        prometheus.wait()
        client = PrometheusClient(prometheus.url)
        wait_for(lambda: any(alert["labels"]["alertname"] == "Straggler" for alert in client.alerts()), 120)
        server = serve(root, client)
        urllib.request.urlopen(f"{server.url}api/overview").read()
        loads, updates = [], []
        for place in ("", "#/run/run-3", "", "#/run/run-3"):
            browser.open(server.url + place)
            loads.append(int(browser.evaluate("document.body.dataset.loadedMs")))
            browser.wait("document.body.dataset.updateMs", 60)
            updates.append(int(browser.evaluate("document.body.dataset.updateMs")))
            if not place:
                browser.wait_for_text("rank 21 on run-3-node02 holds up run-3")
                browser.wait("document.body.innerText.split('up').length > 32")
                browser.screenshot(pictures / "scale.png")
        browser.wait_for_text("live from Prometheus")
        wait_for(lambda: striking_rows(browser, 32) == [21], 30)
        browser.screenshot(pictures / "scale-run.png")
        memory = resident_bytes(prometheus.process_id)
        print(f"load {loads} ms, update {updates} ms, Prometheus {memory / 1e6:.0f} MB")
        assert min(loads[::2]) <= 2000 and min(loads[1::2]) <= 2000
        assert min(updates[::2]) <= 1000 and min(updates[1::2]) <= 1000
        assert memory <= 500e6
        prometheus.stop()
        browser.open(server.url)
        assert "Prometheus: does not answer" in browser.text() and "run-3" in browser.text()
    finally:
        moving.stop()
        if server:
            server.shutdown()
        if prometheus.alive:
            prometheus.stop()


def wait_for(condition, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)


def resident_bytes(process: int) -> int:
    line = next(text for text in Path(f"/proc/{process}/status").read_text().splitlines() if text.startswith("VmRSS"))
    return 1024 * int(line.split()[1])

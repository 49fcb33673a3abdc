"""Starts Prometheus with the shipped rules, and asks it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from megatron_implicit.errors import LaunchError

RULES = Path(__file__).parent / "rules.yml"
START_S = 20.0
"""Seconds Prometheus may take to answer."""


@dataclass(frozen=True)
class PrometheusSettings:
    """How it is started."""

    program: str
    """Path of the prometheus binary."""
    targets: Path
    """Folder in which jobs register their exporters."""
    storage: Path
    """Where it keeps its database."""
    scrape_s: float = 5.0
    """Seconds between looks at the exporters."""
    retention: str = "15d"
    """How long it remembers; metrics.jsonl has everything for good."""


def find_prometheus(given: Optional[str]) -> Optional[str]:
    """The binary: the one given, or the one on the PATH; None where there is none.

    Raises:
        LaunchError: the one given cannot be run.
    """
    found = shutil.which(given or "prometheus")
    if given and found is None:
        raise LaunchError(f"--prometheus {given} is no program: give the path of the prometheus binary, or none")
    return found


class Prometheus:
    """A process of ours; ``url`` is where it answers, on this machine only."""

    def __init__(self, settings: PrometheusSettings) -> None:
        settings.targets.mkdir(parents=True, exist_ok=True)
        settings.storage.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="megatron_implicit-prometheus-")
        config = Path(self._folder.name) / "prometheus.yml"
        config.write_text(yaml.safe_dump(_configuration(settings)), encoding="utf-8")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = open(settings.storage / "prometheus.log", "ab")
        self._process = subprocess.Popen(
            [settings.program, f"--config.file={config}", f"--storage.tsdb.path={settings.storage / 'data'}",
             f"--storage.tsdb.retention.time={settings.retention}", f"--web.listen-address=127.0.0.1:{port}",
             "--storage.tsdb.min-block-duration=30m", "--log.level=warn"],
            stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def wait(self) -> None:
        """Until it answers.

        Raises:
            LaunchError: it ended, or does not answer.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.alive:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=2).close()
                return
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise LaunchError(f"Prometheus did not start: see {self._log.name}")

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def process_id(self) -> int:
        """Of the process."""
        return self._process.pid

    def stop(self) -> None:
        """Ends the process; its database stays."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()


class PrometheusClient:
    """Asks a Prometheus; every answer is empty where it does not answer."""

    def __init__(self, url: str, timeout: float = 3.0) -> None:
        self.url, self._timeout = url.rstrip("/"), timeout
        self.reachable = True
        """Whether the last question was answered."""

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant vector: ``metric`` (labels) and ``value`` of every series."""
        return self._ask("query", query=expression)

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """A range vector: ``metric`` (labels) and ``values`` of every series."""
        return self._ask("query_range", query=expression, start=start, end=end, step=step)

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that fire or are about to."""
        return self._get("alerts").get("alerts", [])

    def _ask(self, what: str, **parameters: Any) -> list[dict[str, Any]]:
        return self._get(f"{what}?{urllib.parse.urlencode(parameters)}").get("result", [])

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=self._timeout) as answer:
                self.reachable = True
                return json.load(answer)["data"]
        except (OSError, ValueError, KeyError, urllib.error.URLError):
            self.reachable = False
            return {}


def _configuration(settings: PrometheusSettings) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": _seconds(settings.scrape_s), "evaluation_interval": _seconds(settings.scrape_s)},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "megatron_implicit",
                "honor_labels": True,
                "scrape_timeout": _seconds(min(10.0, settings.scrape_s)),
                "file_sd_configs": [
                    {"files": [str(settings.targets.resolve() / "*.json")], "refresh_interval": "5s"}
                ],
            }
        ],
    }


def _seconds(value: float) -> str:
    return f"{round(1000 * value)}ms"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

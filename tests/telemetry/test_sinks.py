"""Sinks: what they write, and that none of them can harm a run."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Optional

import pytest

from megatron_implicit.config import TelemetryConfig
from megatron_implicit.device import Platform
from megatron_implicit.errors import MegatronImplicitError
from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.sinks import Identity, Sink, SinkThreads, standard_sinks
from megatron_implicit.telemetry.sinks import thread as thread_module
from megatron_implicit.telemetry.sinks.jsonl import RankFileSink
from megatron_implicit.telemetry.sinks.prometheus import PrometheusSink


def identity(folder: Path, rank: int = 0, **fields: Any) -> Identity:
    values = {"run": "a", "run_id": "a-1", "run_dir": folder, "job": "7", "node": "n1", "rank": rank,
              "local_rank": rank, "stage": 0, "attempt": 0}  # fmt: skip
    return Identity(**(values | fields))


def metrics(step: int, **fields: Any) -> dict[str, Any]:
    return {"step": step, "time": time.time(), "attempt": 0, "loss": 5.0 - step, "phase": "free"} | fields


class Recorder(Sink):
    """Keeps what it is told; fails in the steps it is told to."""

    name = "recorder"

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.steps: list[int] = []
        self._failing = failing

    def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
        if metrics["step"] in self._failing:
            raise OSError(28, "No space left on device")
        self.steps.append(metrics["step"])


def test_a_sink_that_fails_says_so_once_and_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "REST_S", 0.0)
    good, bad, said = Recorder(), Recorder(failing=(2, 3, 4)), []
    sinks = SinkThreads([bad, good], said.append)
    for step in range(1, 7):
        sinks.step(metrics(step), {})
    sinks.close(60)
    assert good.steps == [1, 2, 3, 4, 5, 6] and bad.steps == [1, 5, 6]
    assert said == [
        "recorder failed (OSError: [Errno 28] No space left on device); training goes on without it",
        "recorder works again",
    ]


def test_a_sink_that_failed_is_left_alone_for_a_while() -> None:
    bad, said = Recorder(failing=(1,)), []
    sinks = SinkThreads([bad], said.append)
    for step in range(1, 4):
        sinks.step(metrics(step), {})
    sinks.close(60)
    assert bad.steps == [] and len(said) == 1


def test_a_sink_that_hangs_does_not_hold_up_training(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Hanging(Sink):
        name = "hanging"

        def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
            release.wait(30)

    said: list[str] = []
    good = Recorder()
    sinks = SinkThreads([Hanging(), good], said.append)
    began = time.monotonic()
    for step in range(2 * thread_module.CAPACITY):
        sinks.step(metrics(step), {})
        while step % 64 == 0 and step not in good.steps:  # no other sink is held up
            assert time.monotonic() < began + 20
            time.sleep(0.001)
    assert sinks.flush(5)  # nothing that a checkpoint needs hangs
    assert time.monotonic() - began < 20  # the sink hangs for 30
    assert said == ["hanging is 512 steps behind: what follows is left out until it catches up"]
    release.set()


def test_an_error_that_ends_the_run_reaches_the_training_thread() -> None:
    def fence() -> None:
        raise MegatronImplicitError("another job holds the run")

    class Fenced(Sink):
        essential = True

        def step(self, metrics: Optional[dict[str, Any]], rank: dict[str, Any]) -> None:
            fence()

    sinks = SinkThreads([Fenced()], print)
    sinks.step(metrics(1), {})
    assert sinks.flush(5)
    with pytest.raises(MegatronImplicitError, match="another job holds the run"):
        sinks.step(metrics(2), {})
    sinks.close(60)


def test_a_sinks_thread_works_on_the_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []
    monkeypatch.setattr(Platform, "use", lambda self, rank: used.append((threading.current_thread().name, rank)))
    SinkThreads([Recorder()], print, local_rank=3).close(60)
    assert used == [("sink recorder", 3)]


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    def names(rank: int, **settings: Any) -> list[str]:
        file = LineFile(tmp_path / "metrics.jsonl")
        return [sink.name for sink in standard_sinks(TelemetryConfig(**settings), identity(tmp_path, rank), file)]

    assert names(0, rank_file_every_s=0) == ["metrics.jsonl"]
    assert names(1, tensorboard=True, wandb="offline") == ["ranks/"]
    assert names(0, tensorboard=True, wandb="offline", prometheus=True) == [
        "metrics.jsonl", "ranks/", "the Prometheus exporter", "TensorBoard", "wandb",
    ]  # fmt: skip


def test_rank_files_hold_means_over_the_steps_between_two_lines(tmp_path: Path) -> None:
    sink = RankFileSink(identity(tmp_path, rank=3), every_s=60)
    for step, busy in ((1, 0.5), (2, 1.0), (3, 2.0)):
        sink.step(None, {"step": step, "busy_s": busy})
    sink.close()
    first, second = [json.loads(line) for line in (tmp_path / "ranks/rank_00003.jsonl").read_text().splitlines()]
    assert (first["steps"], first["busy_s"]) == (1, 0.5)
    assert (second["step"], second["steps"], second["busy_s"], second["node"]) == (3, 2, 1.5, "n1")


def exported(tmp_path: Path, ranks: int) -> tuple[list[PrometheusSink], Path]:
    config = TelemetryConfig(prometheus=True, targets_dir=str(tmp_path / "targets"))
    sinks = [PrometheusSink(config, identity(tmp_path, rank, stage=rank)) for rank in range(ranks)]
    for sink in sinks:
        sink.open()
    (target,) = (tmp_path / "targets").glob("*.json")
    return sinks, target


def scrape(target: Path) -> str:
    address = json.loads(target.read_text())[0]["targets"][0]
    return urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read().decode()


def test_one_exporter_serves_all_ranks_of_a_node(tmp_path: Path) -> None:
    sinks, target = exported(tmp_path, ranks=2)
    labels = json.loads(target.read_text())[0]["labels"]
    assert labels == {"run": "a", "job": "7", "node": "n1", "attempt": "0"}
    for step in (1, 2):
        for rank, sink in enumerate(sinks):
            sink.step(
                metrics(step, unconverged_fraction=None) if rank == 0 else None,
                {"step": step, "busy_s": 0.25 * (rank + 1), "solve_s": 0.1, "own_evaluations_mean": 7.0},
            )
    text = scrape(target)
    assert 'megatron_implicit_loss{job="7",node="n1",rank="0",run="a",stage="0"} 3.0' in text
    assert 'megatron_implicit_busy_s{job="7",node="n1",rank="1",run="a",stage="1"} 0.5' in text
    assert 'megatron_implicit_busy_seconds_total{job="7",node="n1",rank="1",run="a",stage="1"} 1.0' in text
    assert 'megatron_implicit_steps_total{job="7",node="n1",rank="1",run="a",stage="1"} 2.0' in text
    assert 'megatron_implicit_phase{job="7",node="n1",phase="free",rank="0",run="a",stage="0"} 1.0' in text
    assert "megatron_implicit_disk_free_fraction{" in text
    for sink in sinks[::-1]:
        sink.close()
    assert not target.exists()


def test_an_exporter_that_died_is_started_again_and_reported(tmp_path: Path) -> None:
    (sink,), target = exported(tmp_path, ranks=1)
    sink._exporter.stop()
    sink._exporter._thread.join(5)
    with pytest.raises(RuntimeError, match="its server had stopped and was started again"):
        sink.step(metrics(1), {"step": 1, "busy_s": 0.5})
    assert "megatron_implicit_loss" in scrape(target)
    sink.close()


def test_a_job_that_starts_again_replaces_the_registration_of_the_one_before(tmp_path: Path) -> None:
    config = TelemetryConfig(prometheus=True, targets_dir=str(tmp_path / "targets"))
    killed = [PrometheusSink(config, identity(tmp_path, node=node)) for node in ("n1", "n2")]
    for sink in killed:
        sink.open()
    requeued = PrometheusSink(config, identity(tmp_path, node="n1", attempt=1))
    requeued.open()
    (target,) = (tmp_path / "targets").glob("*.json")
    assert json.loads(target.read_text())[0]["labels"]["attempt"] == "1"
    killed[0].close()
    assert target.exists()
    requeued.close()
    killed[1].close()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    (sink,), target = exported(tmp_path, ranks=1)
    port = int(json.loads(target.read_text())[0]["targets"][0].rsplit(":", 1)[1])
    said: list[str] = []
    config = TelemetryConfig(prometheus=True, prometheus_port=port, targets_dir=str(tmp_path / "targets"))
    other = SinkThreads([PrometheusSink(config, identity(tmp_path / "b", run_id="b-1"))], said.append)
    other.step(metrics(1), {"step": 1, "busy_s": 1.0})
    other.close(60)
    sink.close()
    assert len(said) == 1 and "the Prometheus exporter failed (OSError" in said[0]

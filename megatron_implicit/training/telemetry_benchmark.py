"""What telemetry costs a step, with every sink on."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from megatron_implicit.config import Config, config_to_dict
from megatron_implicit.device import current_platform
from megatron_implicit.telemetry.catalogue import RUN_METRICS
from megatron_implicit.telemetry.line_file import LineFile
from megatron_implicit.telemetry.sinks import Identity, SinkThreads, standard_sinks
from megatron_implicit.telemetry.timing import StepClock
from megatron_implicit.training.benchmark import TrainStepBenchmark
from megatron_implicit.training.solver_statistics import OWN_FIELDS

RECORDS = 100
"""Steps that are handed to the sinks alone, to measure what their threads compute."""
SCRAPE_S = 1.0
"""Seconds between a Prometheus' looks; five times as often as the dashboard's."""


class TelemetryBenchmark:
    """Training steps of an implicit decoder, reported to metrics.jsonl, a rank file, TensorBoard, wandb (offline) and
    an exporter that is scraped.

    Args:
        config: resolved, implicit; gives the size of a step.
        evaluations: of a solve.
        phantom_steps: passes with gradient.
    """

    def __init__(self, config: Config, evaluations: int, phantom_steps: int) -> None:
        self._step = TrainStepBenchmark(config, evaluations, phantom_steps)
        self._step.set_evaluations(evaluations)
        self._config, self._clock, self._steps = config, StepClock(), 0
        self._spent: list[float] = []

    def run(self, repeats: int) -> dict[str, Any]:
        """Seconds of a step, of telemetry on its thread and on the sinks' threads, and their shares of the step.

        On a CPU these are seconds of the processor, which another program's load does not change. ``share`` is the
        bar: all of it, as if no core were free for the sinks' threads. ``interleaved_ratio`` says the same by steps
        with and without telemetry in turn.
        """
        with tempfile.TemporaryDirectory(prefix="megatron_implicit-telemetry-") as folder:
            os.environ.setdefault("WANDB_SILENT", "true")
            troubles: list[str] = []
            self._sinks = SinkThreads(self._all_sinks(Path(folder)), troubles.append)
            stop = self._scrape(Path(folder) / "targets")
            self._settle()
            background = self._background_cost()
            bare, told = self._interleaved(repeats)
            stop.set()
            self._sinks.close(30)
        on_thread = statistics.median(self._spent) + self._switching_cost()
        return {
            "device": current_platform().name,
            "torch": torch.__version__,
            "repeats": repeats,
            "step_s": bare,
            "training_thread_s": on_thread,
            "background_cpu_s": background,
            "training_thread_share": on_thread / bare,
            "share": (on_thread + background) / bare,
            "interleaved_ratio": told / bare,
            "troubles": troubles,
        }

    def _all_sinks(self, folder: Path) -> list[Any]:
        telemetry = self._config.telemetry
        telemetry.tensorboard, telemetry.wandb, telemetry.prometheus = True, "offline", True
        telemetry.targets_dir, telemetry.rank_file_every_s = str(folder / "targets"), 1.0
        identity = Identity(
            run="benchmark", run_id="benchmark", run_dir=folder, job="0", node="localhost", rank=0, local_rank=0,
            stage=0, attempt=0, config=config_to_dict(self._config),
        )  # fmt: skip
        return standard_sinks(telemetry, identity, LineFile(folder / "metrics.jsonl"))

    @staticmethod
    def _now() -> float:
        return time.process_time() if current_platform().device_type == "cpu" else time.perf_counter()

    def _interleaved(self, repeats: int) -> list[float]:
        """Median seconds of a step without and with telemetry."""
        times: list[list[float]] = [[], []]
        for number in range(repeats + 1):
            for step, measured in zip((self._step.solve, self._told_step), times):
                current_platform().synchronize()
                began = self._now()
                step()
                current_platform().synchronize()
                if number:  # the first round warms up
                    measured.append(self._now() - began)
        return [statistics.median(measured) for measured in times]

    def _told_step(self) -> None:
        with self._clock.step():
            self._step.solve()
        began = time.thread_time()
        self._tell(self._clock.times)
        self._spent.append(time.thread_time() - began)

    def _tell(self, times: Any) -> None:
        self._steps += 1
        metrics = {name: 1.5 * self._steps for name in RUN_METRICS} | {"step": self._steps, "time": time.time()}
        rank = dict.fromkeys(("rank_tokens_per_s", "rank_memory_bytes", *OWN_FIELDS), 1.0) | {"step": self._steps}
        self._sinks.step(metrics | {"phase": "main", "attempt": 0}, rank, times)

    def _settle(self) -> None:
        """Waits until the sinks are open: that is paid once a job."""
        with self._clock.step():
            pass
        self._tell(self._clock.times)
        self._sinks.drain(120)

    def _background_cost(self) -> float:
        """Processor seconds that all sinks' threads take for one step."""
        began = time.process_time()
        for _ in range(RECORDS):
            self._tell(self._clock.times)
        self._sinks.drain(120)
        return (time.process_time() - began) / RECORDS

    def _switching_cost(self) -> float:
        """Seconds of the clock's marks in one step of this size: one a collective or part, far fewer than 100."""
        began = time.thread_time()
        with self._clock.step():
            for _ in range(50):
                self._clock.switch("solve")
                self._clock.switch("communication")
        return time.thread_time() - began

    @staticmethod
    def _scrape(targets: Path) -> threading.Event:
        """Asks the exporter as Prometheus does, until the event is set."""
        stop = threading.Event()

        def scrape() -> None:
            while not stop.wait(SCRAPE_S):
                for path in targets.glob("*.json"):
                    address = json.loads(path.read_text())[0]["targets"][0]
                    urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read()

        threading.Thread(target=scrape, daemon=True).start()
        return stop

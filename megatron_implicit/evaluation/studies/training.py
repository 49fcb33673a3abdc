"""Trains the models of a study with launch/pretrain.py, each in a folder of its own, several at a time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Optional, Sequence

from megatron_implicit import exits
from megatron_implicit.errors import MachineError
from megatron_implicit.evaluation.studies.study import StudyContext, write_json
from megatron_implicit.telemetry.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[3]
"""The repository, where launch/ is."""
DONE_FILE = "training.json"
"""Seconds a run took so far, and whether it is done."""
LOG_FILE = Path("logs") / "study.log"
MIN_MINUTES = 0.2
"""What a run that had nearly used up its time gets for its end, should it be started again."""


@dataclass(frozen=True)
class Training:
    """A run of launch/pretrain.py."""

    name: str
    """Folder below the context's ``runs``."""
    config: str
    """A preset of launch/configs/, or a YAML file."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted configuration keys and values."""
    after: Optional["Training"] = None
    """The run whose last checkpoint this one goes on from; it is trained first."""
    minutes: Optional[float] = None
    """Wall-clock minutes after which the run counts as finished, if it has not ended before; None sets no limit."""


def training_mark(*values: Any) -> str:
    """Part of a name: trainings that differ in any of these values differ in it, so that none is taken for another."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    folder: Path
    seconds: float
    """Wall-clock time of its processes, start-up included, and of the runs it goes on from."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One object a step, of this run alone."""
        return read_metrics(self.folder / "metrics.jsonl")


def train_all(trainings: Sequence[Training], context: StudyContext) -> list[Trained]:
    """Trains what is not trained yet, ``context.workers`` at a time, and returns all in the given order.

    Trainings may share the runs they go on from.

    Raises:
        MachineError: a run failed; names its log. The others are finished first, and the same call goes on.
    """
    locks: dict[str, Lock] = defaultdict(Lock)
    with ThreadPoolExecutor(max(1, context.workers)) as pool:
        futures = {pool.submit(_train, training, context, locks): training for training in trainings}
        for future in as_completed(futures):
            if future.exception() is None:
                context.say(f"trained {futures[future].name} in {future.result().seconds:.0f} s")
        return [future.result() for future in futures]


def _train(training: Training, context: StudyContext, locks: dict[str, Lock]) -> Trained:
    before = _train(training.after, context, locks) if training.after else None
    folder = context.runs / training.name
    with locks[training.name]:
        spent = _read_spent(folder)
        if not spent["done"]:
            spent = _go_on(training, folder, before, context, spent["seconds"])
    return Trained(folder, spent["seconds"] + (before.seconds if before else 0.0))


def _read_spent(folder: Path) -> dict[str, Any]:
    """Seconds spent on a run so far, and whether it is done."""
    path = folder / DONE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0, "done": False}


def _go_on(
    training: Training, folder: Path, before: Optional[Trained], context: StudyContext, spent: float
) -> dict[str, Any]:
    """Starts the run or resumes it; keeps what it took, however it ends."""
    began, state = time.monotonic(), {"seconds": spent, "done": False}
    try:
        code = _pretrain(_command(training, folder, before, context, spent), folder)
        state["seconds"] += time.monotonic() - began
        state["done"] = code == exits.DONE or (code == exits.REQUEUE and _time_is_up(training, state["seconds"]))
    finally:
        write_json(folder / DONE_FILE, state)
    if not state["done"]:
        log = folder / LOG_FILE
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise MachineError(f"training of {training.name} ended with code {code}: {' '.join(last)} (all of it: {log})")
    return state


def _time_is_up(training: Training, seconds: float) -> bool:
    return training.minutes is not None and seconds > 0.9 * 60 * training.minutes


def _command(
    training: Training, folder: Path, before: Optional[Trained], context: StudyContext, spent: float
) -> list[str]:
    overrides = {**training.overrides, "run.dir": folder, "telemetry.plots": "false"}
    if before is not None:
        overrides["checkpoint.load"] = before.folder
    if training.minutes is not None:
        left = max(training.minutes - spent / 60, MIN_MINUTES)
        overrides |= {"run.time_limit_minutes": f"{left:.3f}", "run.time_margin_s": 0}
    config = training.config if training.config.endswith(".yaml") else f"launch/configs/{training.config}.yaml"
    command = [*launcher(context.workers), str(ROOT / "launch" / "pretrain.py"), f"--config={ROOT / config}"]
    return command + [f"--{key}={value}" for key, value in overrides.items()]


def _pretrain(command: Sequence[str], folder: Path) -> int:
    """Its exit code; what it says is appended to the run's log."""
    log = folder / LOG_FILE
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        code = subprocess.run(command, cwd=Path.cwd(), env=_environment(), stdout=output, stderr=output).returncode
    if code == exits.INTERRUPTED:
        raise KeyboardInterrupt
    return code


def launcher(workers: int) -> list[str]:
    """One process on a CPU; all GPUs of a machine that has some, divided by the trainings at a time."""
    from megatron_implicit.device import current_platform

    devices = (current_platform().device_count() or 1) // max(1, workers)
    if devices <= 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}

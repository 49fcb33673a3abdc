"""A small dataset, and runs of launch/pretrain.py as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from tests.distributed.harness import WorkerPool

REPOSITORY = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "model": {"family": "implicit_mamba2", "size": "custom", "num_layers": 2, "hidden_size": 64, "state_size": 16,
              "head_dim": 16, "scan_chunk_size": 32},
    "curriculum": [
        {"name": "bounded", "start": 0.0, "max_iterations": 3, "phantom_steps": 1, "tolerance": 0.0},
        {"name": "free", "start": 0.5, "max_iterations": 12, "phantom_steps": 2},
    ],
    "data": {"sequence_length": 32, "split": [0.8, 0.1, 0.1]},
    "optimizer": {"learning_rate": 3e-3},
    "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "validate_every": 4, "validation_batches": 2},
    "checkpoint": {"save_every": 3},
    "telemetry": {"console_every": 1, "plots": False},
}  # fmt: skip


DECIDED = (
    "step", "tokens", "loss", "validation_loss", "grad_norm", "learning_rate", "phase", "iterations_mean",
    "iterations_max", "evaluations_mean", "evaluations_max", "residual_mean", "residual_max", "unconverged_fraction",
    "skipped",
)  # fmt: skip
"""Metrics that a resumed run repeats bit for bit."""


@dataclass
class Job:
    """How a job ended."""

    code: int
    output: str
    errors: list[str]
    """Lines of stderr that begin with 'error:'."""


@dataclass
class Ranks:
    """The processes of a job that runs, started one a rank, with no agent around them."""

    processes: "list[subprocess.Popen[str]]"
    logs: list[Path]

    def wait(self, timeout: float = 180) -> list[Job]:
        """How each rank ended."""
        jobs = []
        for process, log in zip(self.processes, self.logs):
            code = process.wait(timeout)
            output = log.read_text(encoding="utf-8")
            jobs.append(Job(code, output, [line for line in output.splitlines() if line.startswith("error:")]))
        return jobs

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def train(arguments: list[str]) -> str:
    """A rank of a job, as launch/pretrain.py runs it; its error's type, exit code and message, or ''."""
    from megatron_implicit.comm.groups import Place
    from megatron_implicit.errors import MegatronImplicitError
    from megatron_implicit.training.session import configure, open_session

    try:
        open_session(configure(arguments), Place(dist.get_rank(), dist.get_world_size(), dist.get_rank())).run()
    except MegatronImplicitError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return ""


class Runs:
    """Starts jobs on a small dataset.

    Args:
        folder: holds data/ and the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        settings = {**SETTINGS, "data": {**SETTINGS["data"], "path": str(folder / "data")}}
        self.config.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def start(self, name: str, *arguments: str, processes: int = 1, config: bool = True) -> Job:
        """Runs launch/pretrain.py in the run's folder ``name`` and waits for its end."""
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        )
        command = [sys.executable, "-W", "ignore", *launcher, str(REPOSITORY / "launch" / "pretrain.py")]
        command += ["--config", str(self.config)] if config else []
        command += ["--run.dir", str(self.folder / name), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        return Job(done.returncode, done.stdout + done.stderr, errors)

    def launch(
        self, name: str, *arguments: str, processes: int = 1, config: bool = True,
        environment: dict[str, str] | None = None,
    ) -> Ranks:  # fmt: skip
        """Starts a job's ranks, as srun does, and returns while they run."""
        command = [sys.executable, "-W", "ignore", str(REPOSITORY / "launch" / "pretrain.py")]
        command += ["--config", str(self.config)] if config else []
        command += ["--run.dir", str(self.folder / name), *arguments]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started, logs = [], []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
            if processes > 1:
                variables |= {name: str(value) for name, value in place.items()}
            logs.append(self.folder / f"{name}.{len(list(self.folder.glob(f'{name}.*.log')))}.log")
            with open(logs[-1], "w", encoding="utf-8") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env=variables))
        return Ranks(started, logs)

    def run_in(
        self, pool: Callable[[int], WorkerPool], name: str, *arguments: str, config: bool = True,
        job: Callable[[list[str]], str] = train,
    ) -> list[str]:  # fmt: skip
        """Runs a job on two processes that have started already; each rank's error, or ''."""
        chosen = ["--config", str(self.config)] if config else []
        return pool(2).run(job, [*chosen, "--run.dir", str(self.folder / name), *arguments])

    def wait_for_step(self, name: str, step: int, timeout: float = 240) -> None:
        """Until the run has written that step's metrics."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                if max(self.metrics(name), default=-1) >= step:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{name} has not reached step {step}")

    def events(self, name: str) -> list[dict[str, Any]]:
        """All events of a run."""
        lines = (self.folder / name / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def numbers(self, name: str) -> list[dict[str, Any]]:
        """All that training decides of every step, exactly: what is left when times and memory are taken out."""
        entries = self.metrics(name)
        return [{key: entries[step].get(key) for key in DECIDED} for step in sorted(entries) if step]

    def metrics(self, name: str) -> dict[int, dict[str, Any]]:
        """The last line of each step of a run."""
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {entry["step"]: entry for entry in map(json.loads, lines)}

    def losses(self, name: str) -> list[tuple[float, float, float | None]]:
        """Loss, gradient norm and held-out loss of every step, exactly."""
        entries = self.metrics(name)
        return [
            (entries[step]["loss"], entries[step]["grad_norm"], entries[step].get("validation_loss"))
            for step in sorted(entries) if step
        ]  # fmt: skip

    def copy(self, name: str, new_name: str) -> Path:
        """A copy of a run, to be damaged."""
        return Path(shutil.copytree(self.folder / name, self.folder / new_name))

    def contents(self, name: str) -> dict[str, bytes]:
        """Every file of a run and what is in it."""
        folder = self.folder / name
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A dataset of a few thousand tokens and one finished run, 'whole', on one process."""
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(
        folder / "data", [f"Sentence {i} tells of {i * i} things and of their order.\n" * 4 for i in range(120)]
    )
    runs = Runs(folder)
    job = runs.start("whole")
    assert job.code == 0, job.output
    return runs


WORD_SETTINGS: dict[str, Any] = {
    "model": {"family": "implicit_mamba2", "size": "custom", "num_layers": 1, "hidden_size": 32, "state_size": 16,
              "head_dim": 16, "scan_chunk_size": 16},
    "solver": {"max_iterations": 4, "phantom_steps": 1},
    "data": {"task": "word_problem", "group": "Z5", "sequence_length": 4},
    "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.0},
    "schedule": {"warmup_fraction": 0.05, "decay_fraction": 0.0},
    "train": {"steps": 60, "global_batch_size": 32, "micro_batch_size": 16, "validate_every": 5,
              "validation_batches": 2, "target_loss": 1.3},
    "checkpoint": {"save_every": 0},
    "telemetry": {"plots": False},
}  # fmt: skip


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A word problem, and a run 'learned' that has reached its target."""
    runs = Runs(tmp_path_factory.mktemp("words"))
    runs.config.write_text(yaml.safe_dump(WORD_SETTINGS), encoding="utf-8")
    job = runs.start("learned")
    assert job.code == 0, job.output
    return runs


def make_dataset(folder: Path, documents: list[str]) -> None:
    """tokenizer.model and corpus.{bin,idx} of some texts."""
    from megatron_implicit.data.indexed import IndexedDatasetWriter
    from megatron_implicit.data.tokenizers import train_sentencepiece

    folder.mkdir(parents=True)
    tokenizer = train_sentencepiece(iter(documents), folder / "tokenizer.model", 320)
    with IndexedDatasetWriter(folder / "corpus", tokenizer) as writer:
        for text in documents:
            writer.add_document(tokenizer.encode(text))
        writer.finish([])


def largest_shard(step_folder: Path) -> Path:
    """The file of a checkpoint that holds most of its tensors."""
    return max(step_folder.glob("*.distcp"), key=lambda path: path.stat().st_size)

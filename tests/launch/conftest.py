"""A small dataset, and runs of launch/pretrain.py as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

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


@dataclass
class Job:
    """How a job ended."""

    code: int
    output: str
    errors: list[str]
    """Lines of stderr that begin with 'error:'."""


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

"""What --dry-run prints for the paper's machines is valid for Slurm: four nodes of eight GPUs, NVIDIA and AMD."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import REPOSITORY
from tests.slurm.cluster import Cluster

ALL = [f"{mode}_{family}_{size}" for mode in ("implicit", "explicit") for family in ("mamba2", "llama")
       for size in ("130m", "370m", "760m", "1.3b")]  # fmt: skip
BILLIONS = {"130m": (0.12, 0.16), "370m": (0.35, 0.43), "760m": (0.72, 0.84), "1.3b": (1.25, 1.45)}
"""What rounds to the paper's names; its own models' embedding and injection included."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of eight (fake) GPUs and 128 processors."""
    started = Cluster(Path("/tmp") / f"slurm8-{tmp_path_factory.getbasetemp().name}", nodes=4, processors=128)
    yield started
    started.stop()


@pytest.mark.parametrize(
    ("preset", "environment"),
    [("implicit_mamba2_1.3b", "mi300x"), ("implicit_llama_1.3b", "nvidia")]
    + [
        pytest.param(preset, environment, marks=pytest.mark.acceptance)
        for preset in ALL for environment in ("mi300x", "nvidia")
        if (preset, environment) not in (("implicit_mamba2_1.3b", "mi300x"), ("implicit_llama_1.3b", "nvidia"))
    ],
)  # fmt: skip
def test_a_dry_run_is_a_valid_job(cluster: Cluster, tmp_path: Path, preset: str, environment: str) -> None:
    shown = cluster.run(
        "bash", REPOSITORY / "SLURM" / "submit.sh", preset, "--dry-run", "--cluster",
        REPOSITORY / "SLURM" / f"cluster.{environment}.env", PYTHON=sys.executable, USER="someone",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    script = tmp_path / "job.sbatch"
    script.write_text(shown.stdout)
    tested = cluster.run("sbatch", "--test-only", script)
    assert tested.returncode == 0 and "to start at" in tested.stderr, tested.stderr
    size = preset.rsplit("_", 1)[-1]
    if size == "1.3b":
        assert re.search(r"on nodes n\[1-4\]", tested.stderr), tested.stderr
    parameters = int(re.search(r"([\d,]+) parameters", shown.stdout)[1].replace(",", ""))
    low, high = BILLIONS[size]
    assert low * 1e9 < parameters < high * 1e9
    assert "197,411 steps of 1,048,576 tokens" in shown.stdout


def test_slurm_refuses_what_the_cluster_has_not(cluster: Cluster, tmp_path: Path) -> None:
    settings = tmp_path / "cluster.env"
    settings.write_text("GPUS_PER_NODE=16\nPARTITION=main\n")
    shown = cluster.run(
        "bash", REPOSITORY / "SLURM" / "submit.sh", "explicit_llama_tiny", "--dry-run", "--cluster", settings,
        "--train.global_batch_size", 16, "--train.micro_batch_size", 1, PYTHON=sys.executable,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    script = tmp_path / "job.sbatch"
    script.write_text(shown.stdout)
    assert cluster.run("sbatch", "--test-only", script).returncode != 0

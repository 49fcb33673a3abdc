"""An implicit pipeline is refused where the device has too few queues for its links, before anything is built."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megatron_implicit.comm import ring
from megatron_implicit.comm.groups import Place
from megatron_implicit.config import load_config
from megatron_implicit.device import prepare_megatron
from megatron_implicit.device.platform import Platform
from megatron_implicit.errors import DataError, LaunchError, MegatronImplicitError

ROOT = Path(__file__).parents[2]
PIPELINE = "--parallel.pipeline=2"


def _opening(monkeypatch: pytest.MonkeyPatch, rocm: bool, *arguments: str) -> MegatronImplicitError:
    """What ends the opening of a two-stage run on GPUs; at the latest that there is no dataset."""
    prepare_megatron()
    from megatron_implicit.training.callbacks import Callback
    from megatron_implicit.training.session import open_session

    monkeypatch.setattr(ring, "current_platform", lambda: Platform("cuda", "nccl", "a GPU"))
    monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
    preset = ROOT / "launch" / "configs" / "implicit_mamba2_tiny.yaml"
    config = load_config(["--config", str(preset), "--data.path=/nowhere/data", "--run.dir=/nowhere/run", *arguments])
    with pytest.raises(MegatronImplicitError) as raised:
        open_session(config, Place(0, 2, 0), [Callback()])
    return raised.value


@pytest.mark.parametrize(
    "rocm, name, value", [(False, "CUDA_DEVICE_MAX_CONNECTIONS", "1"), (True, "GPU_MAX_HW_QUEUES", "2")]
)
def test_too_few_queues_are_refused_for_messages_between_devices(
    monkeypatch: pytest.MonkeyPatch, rocm: bool, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    error = _opening(monkeypatch, rocm, PIPELINE)
    assert isinstance(error, LaunchError) and f"{name}={value} holds work up" in str(error)
    assert "set it to 8 or more, or parallel.pipeline_transport=host" in str(error)
    assert isinstance(_opening(monkeypatch, rocm, PIPELINE, "--parallel.pipeline_transport=host"), DataError)
    assert isinstance(_opening(monkeypatch, rocm, "--parallel.tensor=2"), DataError)


@pytest.mark.parametrize("environment, rocm", [("nvidia", False), ("mi300x", True)])
def test_the_samples_of_a_cluster_s_settings_let_a_pipeline_start(
    monkeypatch: pytest.MonkeyPatch, environment: str, rocm: bool
) -> None:
    command = f"source SLURM/cluster.{environment}.env && setup_node && env -0"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    variables = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "GPU_MAX_HW_QUEUES"):
        monkeypatch.setenv(name, variables.get(name, ""))
    assert isinstance(_opening(monkeypatch, rocm, PIPELINE), DataError)

"""Preparing Megatron-Core: the shim is for machines without a GPU only; versions are checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_implicit.device import current_platform, megatron_version
from megatron_implicit.device import megatron as preparation
from megatron_implicit.errors import LaunchError

ROOT = Path(__file__).parents[2]
WITH_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
before = {name: getattr(torch.cuda, name) for name in ("current_device", "set_device", "Stream", "Event")}
factories, methods = (torch.empty, torch.zeros), (torch.Tensor.cuda, torch.Tensor.type)
from megatron_implicit.device import prepare_megatron
try:
    prepare_megatron()
except (RuntimeError, AssertionError) as error:  # Megatron-Core then looks for the GPU that is not there
    print("stopped:", error)
assert before == {name: getattr(torch.cuda, name) for name in before}
assert (torch.empty, torch.zeros) == factories and (torch.Tensor.cuda, torch.Tensor.type) == methods
print("untouched")
"""


def test_the_shim_leaves_a_machine_with_a_gpu_alone() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITH_A_GPU], capture_output=True, text=True, cwd=ROOT)
    assert "untouched" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU needs no shim")
def test_the_shim_sends_cuda_literals_to_the_cpu() -> None:
    preparation.prepare_megatron()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.int64).type() == "torch.LongTensor"
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    assert current_platform().backend == "gloo"


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preparation.OLDEST <= megatron_version() <= preparation.NEWEST
    monkeypatch.setattr(preparation, "megatron_version", lambda: (0, 99))
    with pytest.raises(LaunchError, match=r"megatron-core 0.99 is not supported: install one from 0.16 to 0.19"):
        preparation._check_version()


def test_keywords_of_newer_versions_are_dropped() -> None:
    def older(a: int) -> None: ...

    assert preparation.accepted_arguments(older, a=1, b=2) == {"a": 1}

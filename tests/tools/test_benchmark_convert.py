"""The bar for converting a model of the largest size: little more memory than its largest tensor, minutes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.conftest import REPOSITORY

_ROOM = 20_000_000_000


@pytest.mark.acceptance
@pytest.mark.parametrize("family", ["implicit_mamba2", "explicit_llama"])
def test_a_model_of_1_3b_converts_in_little_memory_and_time(tmp_path: Path, family: str) -> None:
    if shutil.disk_usage(tmp_path).free < _ROOM:
        pytest.skip("needs 20 GB of disk")
    command = [sys.executable, str(REPOSITORY / "tools/benchmark.py"), "convert", "--family", family]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["parameters"] > 1.2e9
    for way in ("reference_to_megatron", "megatron_to_reference"):
        assert result[way]["peak_anonymous_bytes"] <= 1.5e9
        assert result[way]["seconds"] <= 300

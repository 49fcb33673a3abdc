"""mamba_ssm's Triton kernels, which a GPU runs, agree with the torch versions a CPU runs: no GPU needed.

``install_triton_check.sh`` installs what this needs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_check.py")
ROOT = SCRIPT.parents[2]
MISSING = [name for name in ("triton", "mamba_ssm", "einops") if importlib.util.find_spec(name) is None]
TOLERANCE, FLOAT16_TOLERANCE = 2e-5, 2e-3  # rounding: measured at most 4e-6 (A's gradient) and 4e-4


@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: bash tests/ops/install_triton_check.sh PYTHON"
)
def test_interpreted_triton_kernels_match_the_torch_versions_with_every_gradient() -> None:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert len(report) == 6
    for case, differences in report.items():
        tolerance = FLOAT16_TOLERANCE if "float16" in case else TOLERANCE
        assert {name: value for name, value in differences.items() if not value <= tolerance} == {}, case

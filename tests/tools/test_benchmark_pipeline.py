"""``tools/benchmark.py pipeline``: a recorded step on real processes, its replay, and the planner beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def _benchmark(*arguments: str, timeout: float) -> dict:
    command = [sys.executable, "tools/benchmark.py", "pipeline", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_small_step_is_recorded_and_replayed(tmp_path: Path) -> None:
    small = ["--stages", "2", "--layers", "3", "--microbatches", "4", "--width", "32", "--sequence-length", "32"]
    result = _benchmark(*small, "--vocabulary", "64", "--trace", str(tmp_path / "trace.json"), timeout=120)
    assert sum(result["layers_per_stage"]) == 3
    assert result["phases"]["bounded"]["evaluations"] == {"4": 4}
    for phase in result["phases"].values():
        assert 0 < phase["imbalance_percent"] <= phase["bubble_percent"] < 60
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len({(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}) == 2 * 2 * 2


@pytest.mark.acceptance
def test_the_bubble_of_four_stages_is_below_eight_percent() -> None:
    """64 microbatches at the default limits, head counted, layers divided by the planner."""
    result = _benchmark(timeout=900)
    assert result["limits"] == {"solving": 8, "graphs": 4, "block": 2} and result["microbatches"] == 64
    for phase in result["phases"].values():
        assert phase["bubble_percent"] <= 8
        assert abs(phase["bubble_percent"] - phase["planner_bubble_percent"]) <= 3


def test_the_simulated_table_has_all_cases() -> None:
    rows = _benchmark("--simulate", "--microbatches", "8", timeout=120)
    assert len(rows) == 2 * 3 * 4 and all(0 < row["bubble_percent"] < 60 for row in rows)

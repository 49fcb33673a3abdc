"""``tools/plan_run.py``: a table, JSON, the configuration's own layout, and one line for wrong input."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PRESET = "launch/configs/implicit_llama_130m.yaml"


def _plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/plan_run.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_json_has_the_hours_of_the_configurations_own_layout() -> None:
    done = _plan("--config", PRESET, "--device", "H200", "--tokens", "1e9", "--this-layout", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    (plan,) = values["plans"]
    assert plan["layout"]["tensor"] == 1 and plan["layout"]["data"] == 8 and plan["layout"]["micro_batch_size"] == 8
    assert values["tokens"] == pytest.approx(1e9, rel=0.01)
    assert [phase["passes"] for phase in plan["phases"]] == ["4+1", "32+4"]
    hours = sum(phase["steps"] * phase["step_s"] * 8 / 3600 for phase in plan["phases"])
    assert plan["gpu_hours"] == pytest.approx(hours) == pytest.approx(sum(p["gpu_hours"] for p in plan["phases"]))


def test_the_table_lists_the_best_layouts() -> None:
    done = _plan("--config", PRESET, "--gpus-per-node", "4", "--train.global_batch_size", "32", "--top", "2")
    assert done.returncode == 0, done.stderr
    for text in ("1 x 4 H100", "GPU hours", "bubble", "4+1", "32+4", "2 of"):
        assert text in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", "missing.yaml"], "no such file"),
        (["--config", PRESET, "--device", "Unknown"], "--peak-tflops"),
        (["--config", PRESET, "--bogus"], "--bogus"),
        (["--config", PRESET, "--model.bogus", "1"], "model.bogus"),
        (["--config", PRESET, "--evaluations", "many"], "--evaluations many"),
        (["--config", PRESET, "--memory-gb", "0.1"], "no layout"),
        (["--config", PRESET, "--gpus-per-node", "7", "--this-layout"], "global_batch_size"),
        (["--config", PRESET, "--top", "0"], "--top"),
    ],
)
def test_wrong_input_ends_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["plan_run.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("tools/plan_run.py", run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code != 0 and printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ") and words in line

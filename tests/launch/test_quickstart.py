"""The quickstart: arguments, a short real run and its repetition, failures, the closing table."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_implicit.errors import ConfigError
from megatron_implicit.telemetry.summary import summarize
from tests.telemetry.runs import implicit_run, record

LAUNCH = Path(__file__).parents[2] / "launch"
SHORT = ("--train.steps=5", "--train.validate_every=0", "--telemetry.console_every=1")


def start(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The part after set-up, with the tests' own Python."""
    command = [sys.executable, str(LAUNCH / "quickstart.py"), f"--dir={folder}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    """launch/quickstart.py as a module."""
    specification = importlib.util.spec_from_file_location("quickstart", LAUNCH / "quickstart.py")
    module = sys.modules["quickstart"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "llama"], "--model llama: expected implicit_mamba2"),
        (["--model"], "--model needs a value"),
        (["--steps", "3"], "unknown argument '--steps'"),
        (["implicit_llama"], "unknown argument 'implicit_llama'"),
        (["--run.dir=elsewhere"], "--run.dir cannot be set here"),
    ],
)
def test_wrong_arguments_end_in_one_line_before_set_up(arguments: list[str], words: str) -> None:
    command = ["bash", str(LAUNCH / "quickstart.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


def test_help_needs_no_set_up(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCH / "quickstart.sh"), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHON": "/nowhere"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("Usage: bash launch/quickstart.sh")


def test_a_run_ends_with_a_table_and_its_repetition_makes_nothing_again(tmp_path: Path) -> None:
    first = start(tmp_path, *SHORT)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "implicit_mamba2"
    made = [tmp_path / "data" / name for name in ("tokenizer.model", "corpus.bin", "corpus.idx")]
    made += [run / "checkpoints" / "step_00000005", run / "metrics.jsonl", run / "perplexity.json"]
    made += [run / "plots" / f"{name}.png" for name in ("loss", "evaluations", "residual")]
    assert [path for path in made if not path.exists()] == []
    assert "step 5/5" in first.stdout and "held-out perplexity │" in first.stdout and first.stderr == ""
    assert first.stdout.splitlines()[-3].endswith(str(run / "checkpoints" / "step_00000005"))

    times = [path.stat().st_mtime_ns for path in made]
    second = start(tmp_path)
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout.count(" is there\n") == 5
    assert second.stdout.split("quickstart: ")[1] == first.stdout.split("quickstart: ")[1]
    assert [path.stat().st_mtime_ns for path in made] == times

    changed = start(tmp_path, "--train.steps=6")
    assert changed.returncode != 0 and changed.stdout == ""
    assert changed.stderr.startswith("error: train.steps=6 differs from 5") and changed.stderr.count("\n") == 1
    assert changed.stderr.endswith("; drop the change, or train anew with --dir FOLDER\n")


@pytest.mark.parametrize(
    "override, words",
    [
        ("--train.stepz=5", "unknown configuration key 'train.stepz': did you mean 'train.steps'?"),
        ("--parallel.tensor=4", "needs a multiple of 4 processes"),
    ],
)
def test_wrong_overrides_are_refused_before_anything_is_made(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    places = quickstart.Places("implicit_mamba2", tmp_path / "new")
    with pytest.raises(ConfigError, match=re.escape(words)):
        quickstart.Quickstart(places, [override]).run()
    assert capsys.readouterr().out == "" and not places.base.exists()


def test_the_closing_table_tells_phases_apart(quickstart: ModuleType) -> None:
    measured = {"perplexity": 123.456, "parameters": 847952}
    assert quickstart.result_rows(summarize(implicit_run(40)), measured) == [
        ("parameters", "847,952"),
        ("steps", "40"),
        ("tokens", "40,000"),
        ("time in steps", "20.0 s (2,000 tokens a second)"),
        ("held-out perplexity", "4,023.9 before, 123.5 after"),
        ("evaluations a solve", "bounded 4.0 (at most 6); free 9.0 (at most 11)"),
        ("residual", "bounded 0.2; free 0.04"),
    ]


def test_an_explicit_model_has_no_solves_in_the_table(quickstart: ModuleType) -> None:
    rows = quickstart.result_rows(summarize([record(1), record(2)]), {"perplexity": 50.0})
    assert [name for name, _ in rows] == ["steps", "tokens", "time in steps", "held-out perplexity"]


def test_a_failed_job_is_explained_by_its_own_words(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = "E1 torch/distributed/elastic/multiprocessing/api.py:1] failed\nRoot Cause\n"
    log = tmp_path / "quickstart.log"
    log.write_text(f"warning\nerror: no data\nerror: no data\n{report}")
    quickstart.explain_failure(log)
    assert capsys.readouterr().err == "error: no data\n"
    log.write_text(f"Traceback\nTypeError: wrong\n{report}")
    quickstart.explain_failure(log)
    own = f"error: the training failed; its whole log is {log}"
    assert capsys.readouterr().err.splitlines() == ["Traceback", "TypeError: wrong", own]

"""``tools/evaluate.py`` as a user meets it: its evaluations, their help, and refusals in one line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def _evaluations() -> dict:
    sys.path.insert(0, str(REPOSITORY / "tools"))  # for its _bootstrap
    try:
        spec = importlib.util.spec_from_file_location("evaluate_tool", REPOSITORY / "tools" / "evaluate.py")
        spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
    finally:
        sys.path.pop(0)
    return tool.EVALUATIONS


EVALUATIONS = _evaluations()


def test_help_lists_the_evaluations(work) -> None:
    shown = work.run("evaluate", "--help").stdout
    for name, evaluation in EVALUATIONS.items():
        assert name in shown and evaluation.summary in shown


@pytest.mark.parametrize("name", EVALUATIONS)
def test_each_evaluation_has_help_of_its_own(work, name: str) -> None:
    done = work.run("evaluate", name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: evaluate.py {name}" in done.stdout


def test_what_it_does_not_know_is_refused(work) -> None:
    work.fails("invalid choice: 'perplexties'", "evaluate", "perplexties", code=2)
    work.fails("required: NAME", "evaluate", code=2)
    work.fails("required: --checkpoint (see evaluate.py perplexity --help)", "evaluate", "perplexity", code=2)
    work.fails("nowhere is not a folder", "evaluate", "perplexity", "--checkpoint", "nowhere")


@pytest.mark.parametrize("command", [("evaluate", "perplexity"), ("generate", "--prompt", "a")])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(work, command: tuple[str, ...]) -> None:
    """Before the checkpoint is looked for, even."""
    given = (*command, "--checkpoint", "nowhere", "--json")
    work.fails("--json nope/x.json: there is no folder nope", *given, "nope/x.json", code=2)
    work.fails("--json . is a folder: give a file", *given, ".", code=2)


def test_the_paper_is_measured_with_models_of_its_own(work) -> None:
    assert "--checkpoint" not in work.run("evaluate", "paper", "--help").stdout
    work.fails("unrecognized arguments: --checkpoint", "evaluate", "paper", "--checkpoint", "nowhere", code=2)


def test_downstream_names_missing_files_and_unknown_tasks(work) -> None:
    given = ("evaluate", "downstream", "--checkpoint", "nowhere", "--data")
    work.fails("--data data is not a folder", *given, "data")
    (work.folder / "data").mkdir()
    work.fails("no winogrande_1.1/dev.jsonl (winogrande)", *given, "data", "--tasks", "lambada,winogrande")
    work.fails("there is no task 'arc'", *given, "data", "--tasks", "arc", code=2)

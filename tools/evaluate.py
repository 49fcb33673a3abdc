"""Measures a checkpoint: ``python tools/evaluate.py perplexity --checkpoint runs/quickstart/implicit_mamba2``; repeats
the paper's experiments: ``python tools/evaluate.py paper --size tiny``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command


class Evaluation(NamedTuple):
    """One command of this tool."""

    module: str
    """Has ``add_arguments(parser)`` and ``run(arguments) -> int``; imported only when its command is asked for."""
    summary: str
    """What it measures, in a line."""


_STUDIES = "megatron_implicit.evaluation.studies.command"
EVALUATIONS: dict[str, Evaluation] = {
    "perplexity": Evaluation("megatron_implicit.evaluation.perplexity_command", "loss on held-out text"),
    "downstream": Evaluation("megatron_implicit.evaluation.downstream.command", "seven question sets, with lm-eval"),
    "state-tracking": Evaluation(_STUDIES, "word problems over groups: what explicit models cannot follow"),
    "catbabi": Evaluation(_STUDIES, "questions on stories longer than those of training"),
    "length-extrapolation": Evaluation(_STUDIES, "perplexity by position beyond the training length"),
    "duality": Evaluation(_STUDIES, "simultaneous, chunked and sequential solves against each other"),
    "jacobian": Evaluation(_STUDIES, "the recurrence: d h_t / d h_{t-1} of converged and explicit models"),
    "adaptive-compute": Evaluation(_STUDIES, "evaluations by token, position, word class and difficulty"),
    "phantom-gradient": Evaluation(_STUDIES, "phantom against exact implicit gradient"),
    "paper": Evaluation(_STUDIES, "all of these experiments and one report of them"),
}
"""The evaluations by name. ``arguments.evaluation`` tells a module that serves several which one it is."""

DESCRIPTION = """Measure a checkpoint (a run's folder, its checkpoints/, one step's folder, or a reference model
folder), or repeat the paper's experiments, each with its training, numbers and figures.

    python tools/evaluate.py perplexity --checkpoint runs/quickstart/implicit_mamba2 --split validation
    python tools/evaluate.py state-tracking --size tiny
    python tools/evaluate.py paper --size tiny

"""


def main() -> int:
    """Runs one evaluation."""
    arguments = read_arguments(sys.argv[1:])
    return importlib.import_module(EVALUATIONS[arguments.evaluation].module).run(arguments)


def read_arguments(words: Sequence[str], prog: str = "evaluate.py") -> argparse.Namespace:
    """What a command line asks for; exits after help or a refusal, which name the program ``prog``."""
    name, *rest = words or [""]
    if name not in EVALUATIONS:
        return _all_evaluations(prog).parse_args(words)  # exits
    module = importlib.import_module(EVALUATIONS[name].module)
    parser = CommandParser(module.__doc__, f"{prog} {name}")
    parser.set_defaults(evaluation=name)
    module.add_arguments(parser)
    return parser.parse_args(rest)


def _all_evaluations(prog: str) -> CommandParser:
    width = max(map(len, EVALUATIONS))
    lines = [f"    {name:{width}}  {evaluation.summary}" for name, evaluation in EVALUATIONS.items()]
    heading = "Evaluations (NAME --help has the options of one):\n"
    parser = CommandParser("\n".join([DESCRIPTION + heading, *lines]), prog)
    parser.add_argument("evaluation", choices=EVALUATIONS, metavar="NAME", help="one of the above; comes first")
    return parser


if __name__ == "__main__":
    run_command(main)

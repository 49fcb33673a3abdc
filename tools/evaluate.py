"""Measures a checkpoint: ``python tools/evaluate.py perplexity --checkpoint runs/quickstart/implicit_mamba2``."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command


class Evaluation(NamedTuple):
    """One command of this tool."""

    module: str
    """Has ``add_arguments(parser)`` and ``run(arguments) -> int``; imported only when its command is asked for."""
    summary: str
    """What it measures, in a line."""


EVALUATIONS: dict[str, Evaluation] = {
    "perplexity": Evaluation("megatron_implicit.evaluation.perplexity_command", "loss on held-out text"),
}
"""The evaluations by name. ``arguments.evaluation`` tells a module that serves several which one it is."""

DESCRIPTION = """Measure a checkpoint: a run's folder, its checkpoints/, one step's folder, or a reference model folder.

    python tools/evaluate.py perplexity --checkpoint runs/quickstart/implicit_mamba2 --split validation

"""


def main() -> int:
    """Runs one evaluation."""
    name, *rest = sys.argv[1:] or [""]
    if name not in EVALUATIONS:
        return _all_evaluations().parse_args()  # help or a refusal: exits
    module = importlib.import_module(EVALUATIONS[name].module)
    parser = CommandParser(module.__doc__)
    parser.prog += f" {name}"
    parser.set_defaults(evaluation=name)
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest))


def _all_evaluations() -> CommandParser:
    width = max(map(len, EVALUATIONS))
    lines = [f"    {name:{width}}  {evaluation.summary}" for name, evaluation in EVALUATIONS.items()]
    parser = CommandParser("\n".join([DESCRIPTION + "Evaluations (NAME --help has the options of one):\n", *lines]))
    parser.add_argument("evaluation", choices=EVALUATIONS, metavar="NAME", help="one of the above; comes first")
    return parser


if __name__ == "__main__":
    run_command(main)

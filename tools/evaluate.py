"""Measures a checkpoint: ``python tools/evaluate.py perplexity --checkpoint runs/quickstart/implicit_mamba2``."""

from __future__ import annotations

import json
from pathlib import Path

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command

DESCRIPTION = """Measure a checkpoint: a run's folder, its checkpoints/, one step's folder, or a reference model folder.

    python tools/evaluate.py perplexity --checkpoint runs/quickstart/implicit_mamba2 --split validation
"""


def main() -> int:
    """Runs one evaluation."""
    parser = CommandParser(DESCRIPTION)
    parser.add_argument("evaluation", choices=["perplexity"])
    parser.add_argument("--checkpoint", required=True, metavar="PATH")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--data-path", metavar="PATH", help="where the data is, if not at the run's data.path")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences at a time (default: 4)")
    parser.add_argument("--max-sequences", type=int, metavar="N", help="measure only the first N sequences")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    arguments = parser.parse_args()

    from megatron_implicit.api import load_pretrained
    from megatron_implicit.evaluation.perplexity import measure_perplexity

    lm = load_pretrained(arguments.checkpoint, dtype=arguments.dtype)
    with _progress() as report:
        result = measure_perplexity(
            lm, split=arguments.split, data_path=arguments.data_path, batch_size=arguments.batch_size,
            max_sequences=arguments.max_sequences, report=report,
        )  # fmt: skip
    values = result.as_dict()
    _print_table(values)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def _progress():
    from megatron_implicit.telemetry.progress import counted_progress

    return counted_progress("evaluating", "sequences")


def _print_table(values: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(
            name.replace("_", " "),
            f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value,
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(main)

"""Measure the loss of a checkpoint on text that was held out of training.

    python tools/evaluate.py perplexity --checkpoint runs/quickstart/implicit_mamba2 --split validation

The sequences are split and packed as in training; a run's checkpoint says from which data. Models that come from a
conversion or another program bring none: name it with --data-path.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_implicit.cli import check_output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``tools/evaluate.py perplexity``."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--data-path", metavar="PATH", help="the data, if not at the run's data.path")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences at a time (default: 4)")
    parser.add_argument("--max-sequences", type=int, metavar="N", help="measure only the first N sequences")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table, and writes the values where asked to."""
    check_output_file("--json", arguments.json)

    from megatron_implicit.api import load_pretrained
    from megatron_implicit.evaluation.perplexity import measure_perplexity, refuse_other_tokenizer
    from megatron_implicit.telemetry.progress import counted_progress

    lm = load_pretrained(arguments.checkpoint, dtype=arguments.dtype)
    if arguments.data_path is not None and lm.tokenizer_fingerprint is None:
        refuse_other_tokenizer(Path(arguments.checkpoint), arguments.data_path)
    with counted_progress("evaluating", "sequences") as report:
        result = measure_perplexity(
            lm, split=arguments.split, data_path=arguments.data_path, batch_size=arguments.batch_size,
            max_sequences=arguments.max_sequences, report=report,
        )  # fmt: skip
    values = result.as_dict()
    _print_table(values)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def _print_table(values: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    values = values | {"tokenizer": (values["tokenizer"] or "none")[:12]}  # as much as messages show
    for name, value in values.items():
        table.add_row(
            name.replace("_", " "),
            f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value,
        )
    Console(highlight=False).print(table)

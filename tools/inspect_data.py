"""Look at a dataset, a folder of datasets or a blend before a long run reads it.

    python tools/inspect_data.py data/pile
    python tools/inspect_data.py launch/blend.yaml --samples 5 --plot blend.png

Prints counts, lengths, shares, what preparing left out, how much of the vocabulary occurs, and random documents,
decoded; draws a histogram of lengths. Nothing is written but the plot.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command

_FILE_WIDTH = 160

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_implicit.data.inspection import Coverage, Inspected
    from megatron_implicit.data.tokenizers import Tokenizer


def main() -> None:
    """Prints and draws."""
    arguments = _parser().parse_args()

    from rich.console import Console

    from megatron_implicit.config.schema import DataConfig
    from megatron_implicit.data.datasets import open_tokenizer
    from megatron_implicit.data.inspection import inspect_blend, measure_coverage, sample_documents
    from megatron_implicit.telemetry.data_plots import LengthHistogram, draw_lengths

    data = DataConfig(path=arguments.path, tokenizer=arguments.tokenizer, sequence_length=arguments.sequence_length)
    tokenizer = open_tokenizer(data)
    datasets = inspect_blend(data, tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _FILE_WIDTH  # into a file the table is not squeezed
    _print_counts(console, datasets)
    coverage = measure_coverage(datasets, tokenizer.vocab_size, arguments.coverage_tokens)
    _print_coverage(console, coverage, tokenizer)
    for each in datasets:
        for place, length, text in sample_documents(each, tokenizer, arguments.samples, arguments.seed):
            console.print(f"\n[bold]{place}[/bold] ({length:,} tokens)")
            console.print(text, markup=False)
    plot = Path(arguments.plot)
    histograms = [
        LengthHistogram(each.entry.name, each.bins, each.documents_per_bin, each.tokens_per_bin) for each in datasets
    ]
    draw_lengths(histograms, arguments.sequence_length, plot)
    console.print(f"\nlengths of documents: {plot}")


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    parser.add_argument("path", metavar="PATH", help="a prefix, a folder of datasets, or a blend's YAML file")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: the one beside the dataset")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="documents to show of each dataset")
    parser.add_argument("--seed", type=int, default=0, help="chooses them")
    parser.add_argument("--plot", default="lengths.png", metavar="FILE", help="histogram; default lengths.png")
    parser.add_argument(
        "--sequence-length", type=int, default=2048, metavar="N", help="tokens of a sample, marked in the plot"
    )
    parser.add_argument(
        "--coverage-tokens", type=int, default=100_000_000, metavar="N", help="most tokens to count the vocabulary in"
    )
    return parser


def _print_counts(console: Console, datasets: list[Inspected]) -> None:
    from rich.table import Table

    from megatron_implicit.data.inspection import planned_shares

    table = Table("dataset", "shards", "documents", "tokens", "text", "bytes/token", "share", "epochs", "lengths")
    for each, share in zip(datasets, planned_shares(datasets)):
        table.add_row(
            each.entry.name,
            f"{len(each.prefixes):,}",
            f"{each.documents:,}",
            f"{each.tokens:,}",
            f"{each.text_bytes / 1e6:,.1f} MB",
            f"{each.text_bytes / each.tokens:.2f}",
            f"{share:.1%}",
            str(each.entry.epochs or "any"),
            " ".join(f"{length:,}" for length in each.length_quantiles),
        )
    console.print(table)
    console.print("lengths: tokens of a document at 0, 1, 50, 99 and 100%, its end included")
    for each in datasets:
        for reason, count in sorted(each.skipped.items()):
            console.print(f"{each.entry.name}: {count:,} records left out: {reason}")


def _print_coverage(console: Console, coverage: Coverage, tokenizer: Tokenizer) -> None:
    used = f"{coverage.used:,} of {coverage.vocab_size:,} ids ({coverage.used / coverage.vocab_size:.1%})"
    console.print(f"vocabulary: {used} occur in {coverage.tokens:,} tokens")
    words = ", ".join(f"{tokenizer.decode([i])!r} {part:.1%}" for i, part in coverage.most_frequent)
    console.print(f"most frequent: {words}", markup=False)


if __name__ == "__main__":
    run_command(main)

"""Tokenize a corpus into memory-mapped indexed datasets: .bin, .idx and a manifest .json.

    python tools/preprocess_data.py --input launch/corpus --tokenizer data/tokenizer.model --output data/corpus
        one dataset data/corpus of all files
    python tools/preprocess_data.py --input 'pile/*.jsonl.zst' --tokenizer 20B_tokenizer.json --output-dir data/pile \\
        --workers 16
        one dataset a file, in the folder data/pile
    mpirun -n 4 python tools/preprocess_data.py ... --output-dir data/pile       or srun --mpi=pmix, on several nodes
    python tools/preprocess_data.py --output-dir data/pile --merge data/pile-all
        the finished datasets of a folder as one
    python tools/preprocess_data.py --verify data/pile [--input ...]
        reads everything again: counts, checksums, offsets; with --input the sources' checksums too
    python tools/preprocess_data.py build-index --config launch/configs/NAME.yaml [--data.path ...]
        the sample indices of a training run, ahead of it

A .jsonl file holds one object with a "text" a line, a .parquet file has such a column, a .txt file is one document. A
line that cannot be used is named, counted in the manifest and left out. Killed and started again, a command redoes only
what is unfinished; a finished dataset of the same sources and tokenizer is left as it is, another one is replaced only
with --overwrite.

Exit code: 0 all well, 1 something failed (what is finished stays), 2 wrong usage, 3 finished but records were left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import _bootstrap  # noqa: F401

from megatron_implicit import exits
from megatron_implicit.cli import CommandParser, run_command

if TYPE_CHECKING:
    from megatron_implicit.data.manifest import Manifest


def main() -> int:
    """Runs what the arguments ask for."""
    if sys.argv[1:2] == ["build-index"]:
        return _build_index(sys.argv[2:])
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.verify is not None:
        return _verify(arguments)
    if arguments.output_dir and arguments.merge and not arguments.input:
        return _merge(arguments)
    if not (arguments.input and arguments.tokenizer and bool(arguments.output) != bool(arguments.output_dir)):
        parser.error("give --input, --tokenizer and one of --output and --output-dir; or --verify; or --merge")
    if arguments.merge and not arguments.output_dir:
        parser.error("--merge joins the datasets of an --output-dir; with --output they are one already")
    code = _prepare(arguments)
    return code if not arguments.merge or code is None else max(code, _merge(arguments))


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--input", nargs="+", metavar="PATH", help=".jsonl[.zst|.gz], .parquet or .txt files, globs or folders"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece .model or a tokenizer.json")
    parser.add_argument("--output", metavar="PREFIX", help="one dataset of all inputs: its path without suffix")
    parser.add_argument("--output-dir", metavar="FOLDER", help="one dataset an input file, in this folder")
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes (of each rank); default 1")
    parser.add_argument("--text-key", default="text", metavar="KEY", help='key or column of the text; default "text"')
    parser.add_argument(
        "--max-line-mb", type=_positive, default=100, metavar="N", help="longer lines are left out; default 100"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset of other sources or another tokenizer"
    )
    parser.add_argument("--merge", metavar="PREFIX", help="join the datasets of --output-dir into one")
    parser.add_argument("--verify", nargs="+", metavar="PATH", help="check datasets (folders or prefixes) thoroughly")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _prepare(arguments: argparse.Namespace) -> int | None:
    """Exit code, or None on a rank that has nothing to say."""
    from megatron_implicit.data.corpus import Reading, find_sources
    from megatron_implicit.data.preparation import prepare_dataset, prepare_shards
    from megatron_implicit.data.shards import Recipe
    from megatron_implicit.data.tokenizers import copy_tokenizer, load_tokenizer

    start = time.monotonic()
    sources = find_sources(arguments.input)
    recipe = Recipe(load_tokenizer(arguments.tokenizer), Reading(arguments.text_key, arguments.max_line_mb * 1_000_000))
    options = {"workers": arguments.workers, "overwrite": arguments.overwrite}
    if arguments.output:
        done = prepare_dataset(sources, recipe, arguments.output, **options)
    else:
        done = prepare_shards(sources, recipe, Path(arguments.output_dir), **options)
    if done is None:
        return None
    if arguments.output_dir:
        copy_tokenizer(arguments.tokenizer, arguments.output_dir)
    _say(arguments.output or arguments.output_dir, done.manifests, done.written, time.monotonic() - start)
    return exits.INCOMPLETE if any(manifest.skipped for manifest in done.manifests) else exits.DONE


def _say(name: str, manifests: list[Manifest], written: int, seconds: float) -> None:
    documents, tokens = (sum(getattr(each, field) for each in manifests) for field in ("documents", "tokens"))
    counts = f"{documents:,} documents, {tokens:,} tokens"
    if not written:
        print(f"{name}: exists, up to date ({counts})")
    else:
        megabytes = sum(each.text_bytes for each in manifests) / 1e6
        print(f"{name}: {counts} from {megabytes:.1f} MB of text in {seconds:.1f} s")
    for manifest in manifests:
        for reason, count in manifest.skipped.items():
            print(f"{', '.join(source.name for source in manifest.sources)}: {count:,} left out: {reason}")


def _merge(arguments: argparse.Namespace) -> int:
    from megatron_implicit.data.merging import merge_datasets
    from megatron_implicit.data.verification import all_prefixes

    start = time.monotonic()
    manifest = merge_datasets(all_prefixes(arguments.output_dir), arguments.merge)
    _say(arguments.merge, [manifest], 1, time.monotonic() - start)
    return exits.INCOMPLETE if manifest.skipped else exits.DONE


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_implicit.data.corpus import find_sources
    from megatron_implicit.data.verification import all_prefixes, verify_dataset, verify_sources

    prefixes = [prefix for path in arguments.verify for prefix in all_prefixes(path)]
    sources = find_sources(arguments.input) if arguments.input else []
    problems = verify_sources(prefixes, sources)
    for prefix in prefixes:
        found = verify_dataset(prefix)
        print(f"{prefix}: {found.documents:,} documents, {found.tokens:,} tokens: {'ok' if found.sound else 'BAD'}")
        problems += found.problems
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return exits.FAILURE if problems else exits.DONE


def _build_index(arguments: list[str]) -> int:
    """Opens the data as a training run does; what it would compute is then on disk."""
    from megatron_implicit.config import load_config
    from megatron_implicit.training.data import TrainingData, open_vocabulary

    start = time.monotonic()
    config = load_config(arguments, prog="tools/preprocess_data.py build-index")
    data = TrainingData(config, open_vocabulary(config), replica=0, replicas=1)
    print(
        f"{config.data.path}: sample indices of a run of {config.train.steps:,} steps are there"
        f" ({data.training_samples:,} training samples, {time.monotonic() - start:.1f} s)"
    )
    return 0


if __name__ == "__main__":
    run_command(main)

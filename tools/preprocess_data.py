"""Tokenize a corpus into a memory-mapped indexed dataset: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

    python tools/preprocess_data.py --input launch/corpus --tokenizer data/tokenizer.model --output data/corpus

A .jsonl file holds one object with a "text" a line; a .txt file is one document. A finished dataset of the same
sources and tokenizer is left as it is; another one is replaced only with --overwrite. If anything goes wrong, nothing
is left behind and what was there stays.
"""

from __future__ import annotations

import time

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help=".jsonl[.zst|.gz] or .txt files, globs or folders"
    )
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a SentencePiece .model or a tokenizer.json")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the dataset without suffix")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset of other sources or another tokenizer"
    )
    arguments = parser.parse_args()

    from megatron_implicit.data.corpus import find_sources
    from megatron_implicit.data.preparation import prepare_dataset
    from megatron_implicit.data.progress import corpus_progress
    from megatron_implicit.data.tokenizers import load_tokenizer

    start = time.monotonic()
    sources = find_sources(arguments.input)
    tokenizer = load_tokenizer(arguments.tokenizer)
    with corpus_progress("tokenizing") as report:
        done = prepare_dataset(sources, tokenizer, arguments.output, overwrite=arguments.overwrite, report=report)
    counts = f"{done.manifest.documents:,} documents, {done.manifest.tokens:,} tokens"
    if not done.written:
        print(f"{arguments.output}: exists, up to date ({counts})")
        return
    seconds = time.monotonic() - start
    megabytes = done.text_bytes / 1e6
    print(f"{arguments.output}: {counts} from {megabytes:.1f} MB of text in {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main)

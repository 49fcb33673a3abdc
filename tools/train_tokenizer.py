"""Train a SentencePiece tokenizer that reproduces every text exactly.

    python tools/train_tokenizer.py --input launch/corpus --output data/tokenizer.model --vocab-size 4096

Nothing is normalised and every byte is a piece, so decoding gives back any text. The same input gives the same file.
A tokenizer that exists is replaced only with --overwrite.
"""

from __future__ import annotations

import time

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl[.zst|.gz], .parquet or .txt files, globs or folders",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the tokenizer to write, e.g. tokenizer.model")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="pieces, 256 bytes and 2 special ones included"
    )
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe")
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer at --output")
    arguments = parser.parse_args()

    from rich.console import Console

    from megatron_implicit.data.corpus import CorpusReader, find_sources
    from megatron_implicit.data.tokenizers import train_sentencepiece

    start = time.monotonic()
    reader = CorpusReader(find_sources(arguments.input))
    with Console(stderr=True).status("training the tokenizer"):
        tokenizer = train_sentencepiece(
            reader,
            arguments.output,
            arguments.vocab_size,
            model_type=arguments.model_type,
            overwrite=arguments.overwrite,
        )
    seconds = time.monotonic() - start
    print(
        f"{arguments.output}: {tokenizer.vocab_size} pieces from {reader.text_bytes / 1e6:.1f} MB of text in"
        f" {seconds:.1f} s"
    )


if __name__ == "__main__":
    run_command(main)

"""Convert a model between formats, tensor by tensor.

    python tools/convert_checkpoint.py --from megatron --to hf --input runs/quickstart/explicit_llama --output llama-hf
    python tools/convert_checkpoint.py --from reference --to megatron --input model/ --output converted --verify
    python tools/convert_checkpoint.py --from hf --to megatron --input llama-hf --output start --implicit-from-explicit

megatron    our distributed checkpoints of any layout: a run's folder, its checkpoints/, one step's folder
reference   the folder of the paper's public implementation
hf          Llama and Mamba2 as in transformers; an implicit model becomes a folder with its own code, for
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
mamba_ssm   state-spaces/mamba2 folders

Weights keep their dtype unless --dtype says otherwise, and every tensor is read back and compared. Pickles are read
without running anything in them, code in a folder is never run. The output folder must not exist, or be empty.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command

FORMATS = ("megatron", "reference", "hf", "mamba_ssm")
_FILE_WIDTH = 160


def main() -> int:
    """Converts and reports."""
    arguments = read_arguments(sys.argv[1:])

    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.conversion.convert import convert, open_source
    from megatron_implicit.telemetry.progress import counted_progress

    source = open_source(
        Path(arguments.input), arguments.source, implicit_from_explicit=arguments.implicit_from_explicit
    )
    with counted_progress("converting", "tensors") as report:
        result = convert(source, arguments.target, Path(arguments.output), dtype=arguments.dtype, report=report)
    _print_report(result)
    _print_tokenizer(source, result)
    if arguments.report:
        text = json.dumps(dataclasses.asdict(result), indent=1)
        Path(arguments.report).write_text(text + "\n", encoding="utf-8")
    if arguments.verify:
        _verify(source, arguments)
    return 0


def read_arguments(words: Sequence[str], prog: str = "convert_checkpoint.py") -> argparse.Namespace:
    """What a command line asks for; exits after help or a refusal, which name the program ``prog``."""
    parser = CommandParser(__doc__, prog)
    parser.add_argument("--from", dest="source", choices=FORMATS, required=True, help="format of the input")
    parser.add_argument("--to", dest="target", choices=FORMATS, required=True, help="format of the output")
    parser.add_argument("--input", required=True, metavar="PATH")
    parser.add_argument("--output", required=True, metavar="PATH", help="a new folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of all tensors")
    parser.add_argument(
        "--implicit-from-explicit", action="store_true",
        help="start an implicit model from an explicit one: the same weights, an injection made of the first layer",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="run both sides on sample tokens and print the largest logit difference"
    )
    parser.add_argument("--report", metavar="FILE", help="also write every tensor's name, shape and error as JSON")
    return parser.parse_args(words)


def _print_report(result) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _FILE_WIDTH  # into a file the table is not squeezed
    table = Table("part", "tensors", "parameters", "dtype", "largest error")
    for layer, tensors in result.layers().items():
        count = sum(_elements(tensor.shape) for tensor in tensors)
        dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors}))
        table.add_row(layer, str(len(tensors)), f"{count:,}", dtypes, f"{max(t.error for t in tensors):.1e}")
    console.print(table)
    for key, reason in result.unmapped.items():
        console.print(f"not mapped: {key} ({reason})", markup=False)
    console.print(
        f"{result.family}: {len(result.mapped)} tensors, {result.parameters:,} parameters, "
        f"{len(result.unmapped)} not mapped: {result.source} -> {result.output}",
        markup=False,
    )


def _print_tokenizer(source, result) -> None:
    if result.tokenizer is not None:
        print(f"tokenizer: {result.tokenizer}")
    elif source.config.data.task == "text":
        data = source.config.data
        place = f" or with the data at {data.tokenizer or data.path}" if source.tokenizer_fingerprint else ""
        print(f"tokenizer: none of this model in {source.folder}{place}: copy it to {result.output}")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _verify(source, arguments) -> None:
    from megatron_implicit.conversion.formats import open_model
    from megatron_implicit.conversion.verify import verify

    written = open_model(Path(arguments.output), arguments.target)
    outcome = verify(source, written, exact=arguments.dtype is None)
    print(f"verify: {outcome.sides} on {outcome.tokens} tokens: largest logit difference {outcome.difference:.1e}")


if __name__ == "__main__":
    run_command(main)

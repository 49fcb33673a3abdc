"""Goes on from prompts: ``python tools/generate.py --checkpoint runs/quickstart/implicit_mamba2 --prompt "Once"``."""

from __future__ import annotations

import argparse

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, check_output_file, run_command

DESCRIPTION = """Go on from prompts with a trained model: a run's folder, a checkpoint, or a reference model folder.

    python tools/generate.py --checkpoint runs/quickstart/implicit_mamba2 --prompt "It was a" --show-iterations
    python tools/generate.py --checkpoint runs/quickstart/implicit_mamba2            asks for prompts
    torchrun --nproc-per-node 2 tools/generate.py --checkpoint ... --prompt "It was a"

Without any prompt it asks for them, or takes what is piped into it as one. Several prompts are a batch; each gets what
it would get alone. An empty prompt begins a new text.
"""


def main() -> int:
    """Generates for all prompts."""
    arguments = _parser().parse_args()
    check_output_file("--json", arguments.json)

    from megatron_implicit.api import load_pretrained
    from megatron_implicit.comm.groups import stop_process_group
    from megatron_implicit.inference.command import GenerateCommand

    lm = load_pretrained(arguments.checkpoint, dtype=arguments.dtype)
    GenerateCommand(lm, arguments).run()
    stop_process_group()
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(DESCRIPTION)
    parser.add_argument("--checkpoint", required=True, metavar="PATH")
    parser.add_argument("--tokenizer", metavar="FILE", help="if not beside the checkpoint or its data")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    _add_prompts(parser.add_argument_group("prompts"))
    _add_sampling(parser.add_argument_group("which tokens"))
    _add_solve(parser.add_argument_group("the solve of implicit models (default: as the model was trained for)"))
    output = parser.add_argument_group("output")
    output.add_argument("--show-iterations", action="store_true", help="colour tokens by the evaluations they took")
    output.add_argument("--json", metavar="FILE", help="also write ids, texts and evaluations there")
    return parser


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    group.add_argument("--prompt-ids", action="append", default=[], metavar="I,J,...", help="a prompt as token ids")
    group.add_argument("--prompt-file", metavar="FILE", help='one a line, or a "prompt" a line in a .jsonl file')
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    group.add_argument("--prompt-mode", choices=["simultaneous", "sequential", "chunked", "window"],
                       default="simultaneous", help="how prompts are solved (default: simultaneous)")  # fmt: skip
    group.add_argument("--chunk-size", type=int, metavar="N", help="tokens of a chunk in chunked mode")
    group.add_argument("--window-size", type=int, metavar="N", help="tokens of the window in window mode")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="for each prompt (default: 128)")
    group.add_argument("--cache-tokens", type=int, metavar="N",
                       help="Llama: most tokens of a prompt and what follows it (default: as needed)")  # fmt: skip
    group.add_argument("--ignore-end", action="store_true", help="go on after the end of a text")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the most likely, up to P together")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only those P times the most likely")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="prompt i draws with seed N + i (default: 0)")


def _add_solve(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-iterations", type=int, metavar="N", help="most passes a solve, output pass included")
    group.add_argument("--tolerance", type=float, metavar="X", help="relative residual that ends a solve")
    group.add_argument("--damping", type=float, metavar="X", help="of the solver's step")
    group.add_argument("--warm-start", action="store_true", default=None, help="from the token before, not from 0")


if __name__ == "__main__":
    run_command(main)

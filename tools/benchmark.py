"""Measures this machine and prints JSON: ``python tools/benchmark.py train-step``, ``data`` or ``checkpoint``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command
from megatron_implicit.errors import ConfigError

DESCRIPTION = """Measure this machine and print JSON.

    python tools/benchmark.py train-step                       solve and phantom steps against bare passes of F
    python tools/benchmark.py train-step --family implicit_llama --width 256 --layers 4 --tokens 1024
    python tools/benchmark.py telemetry                        what reporting to every sink costs a step
    python tools/benchmark.py data --help                      tokenizing: compressed text in, datasets out
    python tools/benchmark.py convert --help                   checkpoint conversion: time and memory
    python tools/benchmark.py checkpoint --help                what a save costs training, waited for and in the background
"""
CHECKPOINT_DESCRIPTION = """Measure how long a save of model and optimizer holds up training, when it is waited for and
in the background; prints JSON. Under torchrun, at tensor parallel 1, the ranks are replicas that share the writing.

    python tools/benchmark.py checkpoint                       203M parameters, 2.4 GB
    python tools/benchmark.py checkpoint --width 2048 --layers 48 --precision bf16
"""
DATA_DESCRIPTION = """Measure how fast text and code become datasets, with one worker and with two; prints JSON.

    python tools/benchmark.py data                             with the GPT-NeoX tokenizer, downloaded once
    python tools/benchmark.py data --tokenizer data/tokenizer.model
"""
CONVERT_DESCRIPTION = """Convert a made-up model from reference to megatron and back; time and peak memory as JSON.

    python tools/benchmark.py convert                          the 1.3B implicit Mamba2, 17 GB of disk
    python tools/benchmark.py convert --family implicit_llama --size 130m
"""
CORPUS = Path(__file__).resolve().parent.parent / "launch" / "corpus"


def main() -> int:
    """Runs one benchmark."""
    if sys.argv[1:2] == ["data"]:
        return _measure_data(sys.argv[2:])
    if sys.argv[1:2] == ["convert"]:
        return _measure_conversion(sys.argv[2:])
    if sys.argv[1:2] == ["checkpoint"]:
        return _measure_checkpoints(sys.argv[2:])
    parser = CommandParser(DESCRIPTION)
    parser.add_argument("benchmark", choices=["train-step", "telemetry"])
    parser.add_argument("--family", choices=["implicit_mamba2", "implicit_llama"], default="implicit_mamba2")
    parser.add_argument("--width", type=int, default=256, help="model width (default: 256)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the stack (default: 4)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a microbatch (default: 1024)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--evaluations", type=int, default=24, help="evaluations of a solve (default: 24)")
    parser.add_argument("--phantom-steps", type=int, default=4, help="passes with gradient (default: 4)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each side (default: 15)")
    arguments = parser.parse_args()

    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.config import config_from_dict
    from megatron_implicit.training.benchmark import TrainStepBenchmark
    from megatron_implicit.training.telemetry_benchmark import TelemetryBenchmark

    config = config_from_dict(_configuration(arguments))
    benchmark = {"train-step": TrainStepBenchmark, "telemetry": TelemetryBenchmark}[arguments.benchmark]
    result = benchmark(config, arguments.evaluations, arguments.phantom_steps).run(arguments.repeats)
    print(json.dumps(result, indent=1))
    return 0


def _measure_data(arguments: list[str]) -> int:
    parser = CommandParser(DATA_DESCRIPTION)
    parser.add_argument("--tokenizer", metavar="FILE", help="default: GPT-NeoX-20B's")
    parser.add_argument("--megabytes", type=float, default=48, metavar="N", help="text to tokenize (default: 48)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements of each (default: 3)")
    options = parser.parse_args(arguments)

    from megatron_implicit.data.benchmark import DataBenchmark
    from megatron_implicit.data.corpus import find_sources
    from megatron_implicit.data.neox import fetch_neox_tokenizer
    from megatron_implicit.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer or fetch_neox_tokenizer())
    result = DataBenchmark(tokenizer, find_sources([str(CORPUS)]), options.megabytes).run(options.repeats)
    print(json.dumps(result, indent=1))
    return 0


def _measure_conversion(arguments: list[str]) -> int:
    import tempfile

    families = [f"{kind}_{stack}" for kind in ("implicit", "explicit") for stack in ("mamba2", "llama")]
    parser = CommandParser(CONVERT_DESCRIPTION)
    parser.add_argument("--family", choices=families, default=families[0])
    parser.add_argument("--size", choices=["130m", "370m", "760m", "1.3b"], default="1.3b")
    parser.add_argument("--folder", metavar="PATH", help="where there is room (default: the temporary folder)")
    options = parser.parse_args(arguments)

    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.config import config_from_dict
    from megatron_implicit.conversion.benchmark import ConversionBenchmark

    config = config_from_dict({"model": {"family": options.family, "size": options.size}, "train": {"steps": 1}})
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.folder) as folder:
        command = [str(Path(__file__).parent / "convert_checkpoint.py")]
        result = ConversionBenchmark(config, Path(folder), command).run()
    print(json.dumps(result, indent=1))
    return 0


def _measure_checkpoints(arguments: list[str]) -> int:
    parser = CommandParser(CHECKPOINT_DESCRIPTION)
    parser.add_argument("--width", type=int, default=1024, metavar="N", help="model width (default: 1024)")
    parser.add_argument("--layers", type=int, default=15, metavar="N", help="layers of the Llama (default: 15)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens of a step (default: 32)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="saves of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the file system to measure (default: ./benchmark)")
    options = parser.parse_args(arguments)
    options.family, options.sequence_length = "implicit_llama", options.tokens
    folder = options.folder or Path("benchmark")
    if folder.exists():
        raise ConfigError(f"--folder {folder} exists: the benchmark removes its folder, give one that is not there")

    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.config import config_from_dict
    from megatron_implicit.training.checkpoint_benchmark import CheckpointBenchmark

    solver = {"max_iterations": 2, "tolerance": 0.0, "phantom_steps": 1}
    config = config_from_dict(_configuration(options) | {"solver": solver})
    result = CheckpointBenchmark(config, folder).run(options.repeats)
    if not int(os.environ.get("RANK", 0)):
        print(json.dumps(result, indent=1))
    return 0


def _configuration(arguments) -> dict:
    model = {
        "family": arguments.family, "size": "custom", "hidden_size": arguments.width, "num_layers": arguments.layers,
        "vocab_size": 4096,
    }  # fmt: skip
    if arguments.family.endswith("mamba2"):
        model |= {"state_size": 64, "head_dim": 64, "scan_chunk_size": 64}
    else:
        model |= {"num_heads": max(1, arguments.width // 64)}
    batch = max(1, arguments.tokens // arguments.sequence_length)
    return {
        "model": model,
        "data": {"sequence_length": arguments.sequence_length},
        "train": {"steps": 1, "micro_batch_size": batch, "global_batch_size": batch, "precision": arguments.precision},
        "optimizer": {"learning_rate": 1e-3},
    }


if __name__ == "__main__":
    run_command(main)

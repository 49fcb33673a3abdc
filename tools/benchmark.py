"""Measures this machine and prints JSON: ``tools/benchmark.py`` train-step, pipeline, data or checkpoint."""

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
    python tools/benchmark.py train-step --size 1.3b --layers 8 --precision bf16 --tokens 4096 --sequence-length 2048
    python tools/benchmark.py generate --help                  time and memory of early and late tokens
    python tools/benchmark.py pipeline --help                  the pipeline's bubble, by replay of a recorded step
    python tools/benchmark.py telemetry                        what reporting to every sink costs a step
    python tools/benchmark.py data --help                      tokenizing: compressed text in, datasets out
    python tools/benchmark.py word-problems --help             making words of group elements
    python tools/benchmark.py convert --help                   checkpoint conversion: time and memory
    python tools/benchmark.py checkpoint --help                what a save costs training, waited for and in the background
"""
CHECKPOINT_DESCRIPTION = """Measure how long a save of model and optimizer holds up training, when it is waited for and
in the background; prints JSON. Under torchrun, at tensor parallel 1, the ranks are replicas that share the writing.

    python tools/benchmark.py checkpoint                       209M parameters, 2.5 GB
    python tools/benchmark.py checkpoint --width 2048 --layers 48 --precision bf16
"""
GENERATE_DESCRIPTION = """Measure whether generating costs more, the longer it goes on: median time of an evaluation and
memory around an early and a late token; prints JSON. The model is made up.

    python tools/benchmark.py generate                         Mamba2, whose state is constant: tokens 10 and 10,000
    python tools/benchmark.py generate --family implicit_llama --late 2000
"""
PIPELINE_DESCRIPTION = """Record a step of the recirculating schedule on one process a stage, bounded and free phase;
replay it with the median time of every sort of task; print JSON.

    python tools/benchmark.py pipeline                         4 stages, 64 microbatches, the schedule's default limits
    python tools/benchmark.py pipeline --trace trace.json      also write the timelines for ui.perfetto.dev
    python tools/benchmark.py pipeline --simulate              no run: the bubble by stages and limits, by the simulator
"""
DATA_DESCRIPTION = """Measure how fast text and code become datasets, with one worker and with two; prints JSON.

    python tools/benchmark.py data                             with the GPT-NeoX tokenizer, downloaded once
    python tools/benchmark.py data --tokenizer data/tokenizer.model
"""
WORDS_DESCRIPTION = """Measure how fast one core makes training batches of word problems; prints JSON.

    python tools/benchmark.py word-problems                    A5, S5, A5xM and Z60 at lengths 16 to 2048
    python tools/benchmark.py word-problems --groups S5 --batch-size 512
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
    if sys.argv[1:2] == ["word-problems"]:
        return _measure_words(sys.argv[2:])
    if sys.argv[1:2] == ["pipeline"]:
        return _measure_pipeline(sys.argv[2:])
    if sys.argv[1:2] == ["convert"]:
        return _measure_conversion(sys.argv[2:])
    if sys.argv[1:2] == ["generate"]:
        return _measure_generation(sys.argv[2:])
    if sys.argv[1:2] == ["checkpoint"]:
        return _measure_checkpoints(sys.argv[2:])
    parser = CommandParser(DESCRIPTION)
    parser.add_argument("benchmark", choices=["train-step", "telemetry"])
    parser.add_argument("--family", choices=["implicit_mamba2", "implicit_llama"], default="implicit_mamba2")
    parser.add_argument("--size", choices=["custom", "130m", "370m", "760m", "1.3b"], default="custom")
    parser.add_argument("--width", type=int, help="model width (default: 256, or the size's)")
    parser.add_argument("--layers", type=int, help="layers of the stack (default: 4, or the size's)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a microbatch (default: 1024)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--evaluations", type=int, default=24, help="evaluations of a solve (default: 24)")
    parser.add_argument("--phantom-steps", type=int, default=4, help="passes with gradient (default: 4)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each side (default: 15)")
    parser.add_argument("--any-order", action="store_true", help="train.deterministic=false: sums in any order on a GPU")
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


def _measure_words(arguments: list[str]) -> int:
    parser = CommandParser(WORDS_DESCRIPTION)
    parser.add_argument("--groups", nargs="+", default=["A5", "S5", "A5xM", "Z60"], metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 256, 2048], metavar="N", help="of the words")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="words at a time (default: 64)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="N", help="of each measurement (default: 1)")
    options = parser.parse_args(arguments)

    import torch

    from megatron_implicit.data.tasks.benchmark import tokens_per_second

    torch.set_num_threads(1)
    result = {
        group: {str(n): round(tokens_per_second(group, n, options.batch_size, options.seconds)) for n in options.lengths}
        for group in options.groups
    }
    print(json.dumps({"batch_size": options.batch_size, "tokens_per_s": result}, indent=1))
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


def _measure_generation(arguments: list[str]) -> int:
    parser = CommandParser(GENERATE_DESCRIPTION)
    families = ["implicit_mamba2", "implicit_llama", "explicit_mamba2", "explicit_llama"]
    parser.add_argument("--family", choices=families, default="implicit_mamba2")
    parser.add_argument("--width", type=int, default=64, metavar="N", help="model width (default: 64)")
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="layers of the stack (default: 1)")
    parser.add_argument("--evaluations", type=int, default=4, metavar="N", help="passes for each token (default: 4)")
    parser.add_argument("--early", type=int, default=10, metavar="N", help="early token (default: 10)")
    parser.add_argument("--late", type=int, default=10000, metavar="N", help="late token (default: 10,000)")
    parser.add_argument("--window", type=int, default=200, metavar="N", help="tokens timed at each (default: 200)")
    options = parser.parse_args(arguments)
    if not 0 < options.early < options.late or min(options.window, options.evaluations - 1) < 1:
        raise ConfigError("give --early below --late, --window of at least 1 and --evaluations of at least 2")
    options.tokens, options.sequence_length, options.precision = 32, 32, "fp32"
    options.size, options.any_order = "custom", False

    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.config import config_from_dict
    from megatron_implicit.inference.benchmark import GenerateBenchmark
    from megatron_implicit.telemetry.progress import counted_progress

    inference = {"max_iterations": options.evaluations, "tolerance": 0.0}
    config = config_from_dict(_configuration(options) | {"inference": inference})
    with counted_progress("generating", "tokens") as report:
        result = GenerateBenchmark(config, options.early, options.late, options.window).run(report)
    print(json.dumps(result, indent=1))
    return 0


def _measure_checkpoints(arguments: list[str]) -> int:
    parser = CommandParser(CHECKPOINT_DESCRIPTION)
    parser.add_argument("--width", type=int, default=1024, metavar="N", help="model width (default: 1024)")
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="layers of the Llama (default: 16)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens of a step (default: 32)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="saves of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the file system to measure (default: ./benchmark)")
    options = parser.parse_args(arguments)
    options.family, options.sequence_length = "implicit_llama", options.tokens
    options.size, options.any_order = "custom", False
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


def _measure_pipeline(arguments: list[str]) -> int:
    parser = CommandParser(PIPELINE_DESCRIPTION)
    parser.add_argument("--family", choices=["implicit_mamba2", "implicit_llama"], default="implicit_mamba2")
    parser.add_argument("--stages", type=int, default=4, metavar="N", help="pipeline stages (default: 4)")
    parser.add_argument("--layers", type=int, default=23, metavar="N", help="layers of the model (default: 23)")
    parser.add_argument("--width", type=int, default=64, metavar="N", help="model width (default: 64)")
    parser.add_argument("--vocabulary", type=int, default=4096, metavar="N", help="entries (default: 4096)")
    parser.add_argument("--sequence-length", type=int, default=128, metavar="N", help="tokens (default: 128)")
    parser.add_argument("--microbatches", type=int, default=64, metavar="N", help="of a step (default: 64)")
    parser.add_argument("--solving", type=int, metavar="W", help="microbatches solving at once (default: 2P)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the free phase (default: 0.05)")
    parser.add_argument("--trace", metavar="FILE", help="write the timelines as a Chrome trace")
    parser.add_argument("--simulate", action="store_true", help="print the simulator's table instead")
    parser.add_argument("--head", type=float, default=0.0, help="of --simulate: head over stack, forward (default: 0)")
    options = parser.parse_args(arguments)
    if options.simulate:
        from megatron_implicit.planning.bubbles import bubble_table

        print(json.dumps(list(bubble_table(options.microbatches, options.head)), indent=1))
        return 0
    if options.stages < 2:
        parser.error(f"--stages {options.stages}: a pipeline has at least 2")
    if "RANK" not in os.environ:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.stages), __file__]
        os.execv(sys.executable, [sys.executable, *command, "pipeline", *arguments])

    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.comm.groups import place_from_environment
    from megatron_implicit.config import config_from_dict
    from megatron_implicit.schedules.timeline import write_trace
    from megatron_implicit.training.pipeline_benchmark import PipelineBenchmark

    outcome = PipelineBenchmark(config_from_dict(_pipeline_configuration(options)), place_from_environment()).run()
    if outcome is not None:
        result, timelines = outcome
        if options.trace:
            write_trace(options.trace, timelines)
        print(json.dumps(result, indent=1))
    return 0


def _pipeline_configuration(options) -> dict:
    return {
        "model": _model(options.family, options.width, options.layers, options.vocabulary),
        "solver": {"max_iterations": 24, "phantom_steps": 4, "tolerance": options.tolerance},
        "curriculum": [
            {"name": "bounded", "start": 0.0, "max_iterations": 4, "phantom_steps": 1, "tolerance": 0.0},
            {"name": "free", "start": 0.8},
        ],
        "parallel": {"pipeline": options.stages, "microbatches_in_flight": options.solving},
        "data": {"sequence_length": options.sequence_length},
        "train": {"steps": 1, "micro_batch_size": 1, "global_batch_size": options.microbatches},
        "optimizer": {"learning_rate": 1e-3},
    }


def _model(family: str, width: int, layers: int, vocabulary: int) -> dict:
    model = {
        "family": family, "size": "custom", "hidden_size": width, "num_layers": layers, "vocab_size": vocabulary,
    }  # fmt: skip
    if family.endswith("mamba2"):
        return model | {"state_size": 64, "head_dim": 64, "scan_chunk_size": 64}
    return model | {"num_heads": max(1, width // 64)}


def _configuration(arguments) -> dict:
    batch = max(1, arguments.tokens // arguments.sequence_length)
    if arguments.size == "custom":
        model = _model(arguments.family, arguments.width or 256, arguments.layers or 4, vocabulary=4096)
    else:
        given = {"hidden_size": arguments.width, "num_layers": arguments.layers}
        model = {"family": arguments.family, "size": arguments.size}
        model |= {key: value for key, value in given.items() if value is not None}
    return {
        "model": model,
        "data": {"sequence_length": arguments.sequence_length},
        "train": {
            "steps": 1, "micro_batch_size": batch, "global_batch_size": batch, "precision": arguments.precision,
            "deterministic": not arguments.any_order,
        },  # fmt: skip
        "optimizer": {"learning_rate": 1e-3},
    }


if __name__ == "__main__":
    run_command(main)

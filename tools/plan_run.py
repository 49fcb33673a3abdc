"""Says what a run would cost on a cluster, and how best to divide it: ``python tools/plan_run.py --config FILE``."""

from __future__ import annotations

import json

import _bootstrap  # noqa: F401

from megatron_implicit.cli import CommandParser, run_command

DESCRIPTION = """Predict memory, bubble, step time and GPU hours of a run's layouts on a cluster, best first.

    python tools/plan_run.py --config launch/configs/implicit_mamba2_1.3b.yaml --nodes 4 --device MI300X
    python tools/plan_run.py --config launch/configs/implicit_llama_370m.yaml --device H100 --tokens 20e9 --top 3 --json
    python tools/plan_run.py --config FILE --this-layout --device H200 --parallel.tensor 4

Any key of the configuration can be set as in launch/pretrain.py. Every formula is in docs/planning.md.
"""


def main() -> int:
    """Prints the plans."""
    parser = _parser()
    options, overrides = parser.parse_known_args()
    unknown = next((word for word in overrides if word.startswith("-") and "." not in word), None)
    if unknown:
        parser.error(f"unrecognized argument {unknown}")
    if options.top < 1:
        parser.error(f"--top {options.top}: list at least 1 layout")

    from megatron_implicit.config import load_config
    from megatron_implicit.planning.layouts import layout_of
    from megatron_implicit.planning.plan import Planner
    from megatron_implicit.planning.report import as_dict, print_found
    from megatron_implicit.planning.search import Found, best_plans

    if options.tokens is not None:
        overrides += ["--train.tokens", str(options.tokens), "--train.steps", "null"]
    config = load_config(["--config", options.config, *overrides])
    planner = Planner(config, _cluster(options, config.train.precision), _evaluations(options.evaluations))
    if options.this_layout:
        layers = tuple(config.parallel.layers_per_stage)
        found = Found([planner.plan(layout_of(config, planner.cluster), layers)], 1, 1)
    else:
        found = best_plans(planner, options.top)
    if options.json:
        print(json.dumps(as_dict(planner, found), indent=1))
    else:
        print_found(planner, found)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE", help="of a run; launch/configs/ has presets")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--device", default="H100", metavar="NAME", help="H100 (default), H200, MI300X, ...")
    parser.add_argument("--tokens", type=float, metavar="N", help="token budget (default: the configuration's)")
    parser.add_argument("--evaluations", metavar="N or N:SHARE,...", help="of solves that stop at a tolerance")
    parser.add_argument("--this-layout", action="store_true", help="only the layout that the configuration has")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="layouts to list (default: 8)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="of a device, in the run's precision")
    parser.add_argument("--memory-gb", type=float, metavar="N", help="of a device, in units of 1e9 bytes")
    parser.add_argument("--memory-bandwidth-gbs", type=float, metavar="N", help="of a device, in GB/s")
    parser.add_argument("--intra-node-gbs", type=float, metavar="N", help="a device to the others of its node, GB/s")
    parser.add_argument(
        "--inter-node-gbs", type=float, default=50.0, metavar="N", help="a device to other nodes, GB/s (default: 50)"
    )
    parser.add_argument("--compute-efficiency", type=float, metavar="SHARE", help="of the peak, in matrix products")
    parser.add_argument("--memory-efficiency", type=float, metavar="SHARE", help="of the memory bandwidth")
    parser.add_argument("--link-efficiency", type=float, metavar="SHARE", help="of the links' bandwidths")
    parser.add_argument("--layer-overhead-us", type=float, metavar="N", help="of a layer's forward pass (default: 0)")
    parser.add_argument("--reserved-memory", type=float, metavar="SHARE", help="of the memory, that a plan leaves free")
    return parser


def _cluster(options, precision: str):
    from megatron_implicit.planning.cluster import Assumptions, Cluster

    names = ("compute_efficiency", "memory_efficiency", "link_efficiency", "reserved_memory")
    assumed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.layer_overhead_us is not None:
        assumed["layer_overhead"] = options.layer_overhead_us * 1e-6
    return Cluster.of_device(
        options.device, precision, assumed=Assumptions(**assumed),
        nodes=options.nodes, devices=options.gpus_per_node,
        peak=_times(options.peak_tflops, 1e12), memory_bytes=_times(options.memory_gb, 1e9),
        memory_bandwidth=_times(options.memory_bandwidth_gbs, 1e9), inside=_times(options.intra_node_gbs, 1e9),
        between=options.inter_node_gbs * 1e9,
    )  # fmt: skip


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _evaluations(text: str | None):
    from megatron_implicit.planning.evaluations import FREE, parse_evaluations

    return FREE if text is None else parse_evaluations(text)


if __name__ == "__main__":
    run_command(main)

"""``launch/pretrain.py --dry-run``: builds a model on the meta device and says what it would cost."""

from __future__ import annotations

import sys
from typing import Iterator

from rich.console import Console
from rich.table import Table

from megatron_implicit.config import Config, SolverConfig
from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.telemetry.flops import model_flops
from megatron_implicit.training.data import open_vocabulary
from megatron_implicit.training.memory_plan import StagePlan, memory_plan, plan_stages

GIB = 2**30


def print_plan(config: Config) -> None:
    """Prints parameters by component, memory a rank and FLOPs a token for each phase; by stage on a pipeline.

    Raises:
        DataError: model.vocab_size is not set and there is no tokenizer to take it from.
    """
    if config.model.vocab_size is None:
        open_vocabulary(config)
    stages = plan_stages(config)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(_parameter_table(config, stages))
    console.print(_phase_table(config, stages))
    console.print(_assumptions(config))


def _parameter_table(config: Config, stages: list[StagePlan]) -> Table:
    table = Table(title=f"{config.model.family} {config.model.size}: parameters", title_justify="left")
    pipelined = len(stages) > 1
    columns = [f"rank of stage {plan.stage.index}" for plan in stages] if pipelined else ["this rank"]
    for name in ("component", "whole model", *columns):
        table.add_column(name, justify="left" if name == "component" else "right")
    components = list(dict.fromkeys(name for plan in stages for name in plan.counts))
    for name in components:
        counts = [plan.counts.get(name) for plan in stages]
        whole = sum(count.whole for count in counts if count)
        table.add_row(name, f"{whole:,}", *(f"{count.local:,}" if count else "" for count in counts))
    table.add_section()
    whole = sum(count.whole for plan in stages for count in plan.counts.values())
    local = [sum(count.local for count in plan.counts.values()) for plan in stages]
    size = [sum(count.local_bytes for count in plan.counts.values()) for plan in stages]
    table.add_row("total", f"{whole:,}", *(f"{count:,}" for count in local))
    table.add_row("MiB", "", *(f"{count / 2**20:,.1f}" for count in size))
    if pipelined:
        table.add_row("layers", f"{config.model.num_layers}", *(str(len(plan.stage.layers)) for plan in stages))
    return table


def _phase_table(config: Config, stages: list[StagePlan]) -> Table:
    flops = model_flops(config)
    table = Table(title="memory of a rank (GiB) and model FLOPs of a token, by phase", title_justify="left")
    table.add_column("phase")
    pipelined = len(stages) > 1
    columns = ("parameters", "gradients", "optimizer", "weights", "activations", "total", "FLOPs/token", "FLOPs/run")
    for name in (("stage",) if pipelined else ()) + columns:
        table.add_column(name, justify="right")
    for name, solver, share in _phases(config):
        cost = flops.of_phase(solver, config.implicit)
        costs = [f"{cost:.3g}", f"{cost * share * config.train.tokens:.3g}"]
        for plan in stages:
            memory = memory_plan(config, plan, solver)
            row = [f"{size / GIB:.2f}" for size in (*vars(memory).values(), memory.total)]
            stage = [str(plan.stage.index)] if pipelined else []
            table.add_row(name if plan.stage.is_first else "", *stage, *row, *(costs if plan.stage.is_first else ()))
    return table


def _phases(config: Config) -> Iterator[tuple[str, SolverConfig, float]]:
    """(name, solver, share of the run's tokens) of each phase."""
    if not config.implicit:
        yield "single pass", config.solver, 1.0
        return
    ends = [phase.start for phase in config.curriculum[1:]] + [1.0]
    for phase, end in zip(config.curriculum, ends):
        solver = solver_of_phase(config.solver, phase)
        passes = (
            f"0+{solver.max_iterations}"
            if solver.gradient == "unrolled"
            else f"{solver.max_iterations}+{solver.phantom_steps}"
        )
        yield f"{phase.name} ({passes})", solver, end - phase.start


def _assumptions(config: Config) -> str:
    parallel, train = config.parallel, config.train
    sharded = (
        " (not divided here: parallel.distributed_optimizer shards them over the replicas)"
        if parallel.distributed_optimizer
        else ""
    )
    return (
        f"layout: tensor {parallel.tensor}{', sequence parallel' if parallel.sequence else ''}"
        f"{_pipeline_words(config)}, recompute {parallel.recompute}, "
        f"{train.precision}, microbatch {train.micro_batch_size} x {config.data.sequence_length} tokens\n"
        f"activations are traced with the torch version of the scan, and "
        "without attention scores, which flash attention does not keep\n"
        f"FLOPs if every solve runs to its maximum; gradients fp32, AdamW moments and main parameters fp32{sharded}"
    )


def _pipeline_words(config: Config) -> str:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return ""
    in_flight = f" ({parallel.microbatches_in_flight} microbatches solving)" if config.implicit else ""
    return f", pipeline {parallel.pipeline}{in_flight}"

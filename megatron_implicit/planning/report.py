"""Plans as tables and as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_implicit.config import Config
from megatron_implicit.planning.cluster import Cluster
from megatron_implicit.planning.plan import PhaseCost, Plan, Planner
from megatron_implicit.planning.search import Found

GB = 1e9


def print_found(planner: Planner, found: Found) -> None:
    """A table of the layouts, and one of the best one's phases and memory."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_headline(planner.config, planner.cluster))
    console.print(_layout_table(planner, found.plans))
    if len(found.plans) < found.possible:
        console.print(f"{len(found.plans)} of {found.feasible} layouts that fit; {found.possible} divide the job")
    best = found.plans[0]
    console.print(_phase_table(best))
    console.print(_memory_table(best))
    console.print("to take it: " + " ".join(best.layout.arguments(best.layers)), soft_wrap=True)
    if not planner.fits(best.layout, best.layers):
        console.print(f"it does not fit: {planner.memory_left() / GB:.1f} GB of a device are for use")
    console.print("predicted, not measured: docs/planning.md has every formula; training steps alone")


def as_dict(planner: Planner, found: Found) -> dict[str, Any]:
    """Everything, for JSON. Bytes, seconds and shares; ``plans`` best first."""
    config, cluster = planner.config, planner.cluster
    return {
        "model": {"family": config.model.family, "size": config.model.size},
        "tokens": config.train.tokens,
        "steps": config.train.steps,
        "global_batch_size": config.train.global_batch_size,
        "sequence_length": config.data.sequence_length,
        "precision": config.train.precision,
        "cluster": asdict(cluster),
        "feasible": found.feasible,
        "possible": found.possible,
        "plans": [_plan_dict(planner, plan) for plan in found.plans],
    }


def _plan_dict(planner: Planner, plan: Plan) -> dict[str, Any]:
    microbatches = plan.layout.microbatches(planner.config)
    return {
        "layout": asdict(plan.layout) | {"layers": list(plan.layers), "microbatches": microbatches},
        "arguments": plan.layout.arguments(plan.layers),
        "gpu_hours": plan.gpu_hours,
        "days": plan.days(planner.cluster),
        "memory_bytes": plan.memory.total,
        "fits": planner.fits(plan.layout, plan.layers),
        "phases": [_phase_dict(cost) for cost in plan.phases],
    }


def _phase_dict(cost: PhaseCost) -> dict[str, Any]:
    values = {name: value for name, value in vars(cost).items() if name not in ("phase", "memory")}
    phase = {name: getattr(cost.phase, name) for name in ("name", "passes", "share")}
    return phase | values | {"memory": asdict(cost.memory) | {"total": cost.memory.total}}


def _headline(config: Config, cluster: Cluster) -> str:
    model, train = config.model, config.train
    run = f"{model.family} {model.size}, {train.precision}, {train.tokens / 1e9:,.1f}B tokens in {train.steps:,} steps"
    batch = f"{train.global_batch_size} x {config.data.sequence_length}"
    return f"{run} of {batch}, on {cluster.nodes} x {cluster.devices} {cluster.device}"


def _layout_table(planner: Planner, plans: list[Plan]) -> Table:
    table = Table(title="layouts, fewest GPU hours first", title_justify="left")
    for name in ("t x p x d", "micro", "M", "seq.", "recompute", "W/G/g", "layers", "GB/rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in plans[0].phases:
        table.add_column(f"{phase.phase.name} s/step", justify="right", no_wrap=True)
        table.add_column("bubble %", justify="right")
    for name in ("GPU hours", "days"):
        table.add_column(name, justify="right")
    for plan in plans:
        layout, limits = plan.layout, plan.layout.limits
        row = [f"{layout.tensor} x {layout.pipeline} x {layout.data}", layout.micro_batch_size]
        row += [layout.microbatches(planner.config), "yes" if layout.sequence else "no", layout.recompute]
        row += [f"{limits.solving}/{limits.graphs}/{limits.block}" if limits else "", split_text(plan.layers)]
        row += [f"{plan.memory.total / GB:.1f}"]
        for phase in plan.phases:
            row += [f"{phase.step_s:.3f}", f"{100 * phase.bubble:.1f}"]
        table.add_row(*map(str, row), f"{plan.gpu_hours:,.0f}", f"{plan.days(planner.cluster):.1f}")
    return table


def split_text(layers: tuple[int, ...]) -> str:
    """'13,13,9', and '3x13,9' where three or more neighbours are alike."""
    runs: list[list[int]] = []
    for count in layers:
        if runs and runs[-1][1] == count:
            runs[-1][0] += 1
        else:
            runs.append([1, count])
    return ",".join(f"{times}x{count}" if times > 2 else ",".join([str(count)] * times) for times, count in runs)


def _phase_table(plan: Plan) -> Table:
    table = Table(title="the first layout by phase", title_justify="left")
    names = ("phase", "passes", "evaluations", "steps", "s/step", "tensor s", "gradients s", "MFU %", "GPU hours")
    for name in names:
        table.add_column(name, justify="left" if name == "phase" else "right")
    for cost in plan.phases:
        table.add_row(
            cost.phase.name, cost.phase.passes, f"{cost.evaluations_mean:.1f}", f"{cost.steps:,}", f"{cost.step_s:.3f}",
            f"{cost.collectives_s:.3f}", f"{cost.gradients_s:.3f}", f"{100 * cost.mfu:.1f}", f"{cost.gpu_hours:,.0f}",
        )  # fmt: skip
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table(title="its memory, GB of the rank that needs most", title_justify="left")
    table.add_column("phase")
    for name in (*asdict(plan.memory), "total"):
        table.add_column(name.replace("_", " "), justify="right")
    for cost in plan.phases:
        values = [*asdict(cost.memory).values(), cost.memory.total]
        table.add_row(cost.phase.name, *(f"{value / GB:.2f}" for value in values))
    return table

"""What a run is and what it costs, in a few lines: the head of every batch script.

Models and plans are imported where they are needed: with torch they take seconds on a login node.
"""

from __future__ import annotations

from launch.slurm.cluster import Cluster
from megatron_implicit.config import Config
from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.errors import LaunchError

BETWEEN_NODES = 50e9
"""Bytes/s that a GPU can send to other nodes: a 400 Gb/s card each."""


def describe(config: Config, cluster: Cluster, nodes: int, start: float = 0.0) -> list[str]:
    """Lines about a resolved configuration on some nodes: parameters, steps, learning rate, phases, layout, cost.

    Args:
        config: of the run.
        cluster: where it runs.
        nodes: how many of its nodes.
        start: share of the steps that a branch finds done.
    """
    train, parallel = config.train, config.parallel
    world = nodes * cluster.ranks
    replicas = world // (parallel.tensor * parallel.pipeline)
    tokens = train.global_batch_size * config.data.sequence_length
    schedule = config.schedule
    return [
        f"{config.model.family} {config.model.size}: {_parameters(config)}",
        f"{train.steps:,} steps of {tokens:,} tokens ({train.global_batch_size} x {config.data.sequence_length}), "
        f"{train.tokens / 1e9:.1f}B tokens",
        f"learning rate {config.optimizer.learning_rate:g}, warm-up {schedule.warmup_fraction:.0%}, the last "
        f"{schedule.decay_fraction:.0%} down to {schedule.min_learning_rate:g}",
        *([f"phases: {_phases(config)}"] if config.implicit else []),
        f"{world} ranks on {nodes} node{'s' if nodes > 1 else ''}: tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x {replicas} replicas, microbatches of {train.micro_batch_size}",
        _cost(config, cluster, nodes, start),
    ]


def _cost(config: Config, cluster: Cluster, nodes: int, start: float) -> str:
    """GPU hours as tools/plan_run.py predicts them, by phase."""
    if not cluster.gpus or not cluster.accelerator or config.model.vocab_size is None:
        return "no estimate of GPU hours: it takes ACCELERATOR in cluster.env and a known vocabulary"
    from megatron_implicit.device.peaks import DEVICE_PEAKS, device_peak
    from megatron_implicit.planning.cluster import Cluster as Devices
    from megatron_implicit.planning.layouts import layout_of
    from megatron_implicit.planning.plan import Planner

    if device_peak(cluster.accelerator) is None:
        names = ", ".join(peak.name for peak in DEVICE_PEAKS)
        raise LaunchError(f"{cluster.path}: ACCELERATOR={cluster.accelerator} is not known; known are {names}")
    devices = Devices.of_device(
        cluster.accelerator, config.train.precision, nodes=nodes, devices=cluster.gpus, between=BETWEEN_NODES
    )
    planner = Planner(config, devices)
    plan = planner.plan(layout_of(config, devices))
    texts, total, begin = [], 0.0, 0.0
    for cost in plan.phases:
        end = begin + cost.phase.share
        hours = cost.gpu_hours * max(0.0, end - max(begin, start)) / cost.phase.share
        evaluations = f"{cost.evaluations_mean:.3g} evaluations, " if config.implicit else ""
        texts.append(f"{cost.phase.name} {hours:,.0f} ({evaluations}{cost.step_s:.1f} s a step, MFU {cost.mfu:.0%})")
        total, begin = total + hours, end
    return (
        f"estimated {total:,.0f} GPU hours, {total / devices.world / 24:.1f} days on {devices.world} {devices.device}: "
        + "; ".join(texts)
    )


def _phases(config: Config) -> str:
    texts = []
    for phase in config.curriculum:
        solver = solver_of_phase(config.solver, phase)
        passes = "unrolled" if solver.gradient == "unrolled" else solver.phantom_steps
        stop = f", stops at {solver.tolerance:g}" if solver.tolerance else ""
        texts.append(f"{phase.name} ({solver.max_iterations}+{passes}{stop}) from {phase.start:.0%}")
    return "; ".join(texts)


def _parameters(config: Config) -> str:
    if config.model.vocab_size is None:
        return "parameters depend on the tokenizer's vocabulary"
    from megatron_implicit.device import prepare_megatron

    prepare_megatron()
    from megatron_implicit.training.memory_plan import plan_stages

    counts = [count for plan in plan_stages(config) for count in plan.counts.values()]
    return f"{sum(count.whole for count in counts):,} parameters"

"""What a run is and what it costs, in a few lines: the head of every batch script."""

from __future__ import annotations

from megatron_implicit.config import Config
from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.device import prepare_megatron

from launch.slurm.cluster import Cluster


def describe(config: Config, cluster: Cluster, nodes: int) -> list[str]:
    """Lines about a resolved configuration on some nodes: parameters, steps, learning rate, phases, layout, cost."""
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
        f"{world} ranks on {nodes} node{'s' if nodes > 1 else ''}: tensor {parallel.tensor} x pipeline {parallel.pipeline} "
        f"x {replicas} replicas, microbatches of {train.micro_batch_size}",
    ]


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
    prepare_megatron()
    from megatron_implicit.training.memory_plan import plan_stages

    counts = [count for plan in plan_stages(config) for count in plan.counts.values()]
    return f"{sum(count.whole for count in counts):,} parameters"

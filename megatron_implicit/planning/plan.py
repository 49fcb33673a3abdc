"""What a run costs in one layout: memory, bubble, step time and GPU hours of every phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Optional

from megatron_implicit.config import Config, SolverConfig
from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.errors import ConfigError
from megatron_implicit.planning.cluster import Cluster
from megatron_implicit.planning.evaluations import FREE, Evaluations, evaluations_of
from megatron_implicit.planning.layouts import Layout, Work, applied, balanced_layers
from megatron_implicit.planning.memory import Memory, gradient_passes, peak_memory
from megatron_implicit.planning.timing import Timing
from megatron_implicit.schedules.costs import PartCosts, StageCosts
from megatron_implicit.schedules.protocol import StepPlan
from megatron_implicit.schedules.simulator import simulate

MOST_SIMULATED = 96
"""Microbatches that are simulated; a longer step adds to them what the second half of these took."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one solver."""

    name: str
    solver: SolverConfig
    share: float
    """Of the run's tokens."""
    passes: str
    """'4+1', or '1' for an explicit model."""


@dataclass(frozen=True)
class PhaseCost:
    """One phase in one layout."""

    phase: Phase
    evaluations_mean: float
    memory: Memory
    """Of the rank that needs most."""
    bubble: float
    """Share of the pipeline's time in which its stages wait, 0 without a pipeline."""
    collectives_s: float
    """Seconds of a step in collectives of the tensor group, on a stage."""
    gradients_s: float
    """Seconds of a step in collectives between replicas."""
    step_s: float
    """Seconds of a step."""
    steps: int
    gpu_hours: float
    mfu: float
    """Model FLOPs over what the devices could do in that time."""


@dataclass(frozen=True)
class Plan:
    """One layout."""

    layout: Layout
    layers: tuple[int, ...]
    """Of each stage."""
    phases: tuple[PhaseCost, ...]

    @property
    def gpu_hours(self) -> float:
        """Of the whole run: training steps alone, without validation, checkpoints and restarts."""
        return sum(phase.gpu_hours for phase in self.phases)

    @property
    def memory(self) -> Memory:
        """Of the rank and phase that need most."""
        return max((phase.memory for phase in self.phases), key=lambda memory: memory.total)

    def days(self, cluster: Cluster) -> float:
        """Of the whole run on the cluster."""
        return self.gpu_hours / cluster.world / 24


def phases_of(config: Config) -> list[Phase]:
    """The run's phases, with their shares of its tokens."""
    if not config.implicit:
        return [Phase("single pass", config.solver, 1.0, "1")]
    ends = [phase.start for phase in config.curriculum[1:]] + [1.0]
    phases = []
    for phase, end in zip(config.curriculum, ends):
        solver = solver_of_phase(config.solver, phase)
        unrolled = solver.gradient == "unrolled"
        passes = f"0+{solver.max_iterations}" if unrolled else f"{solver.max_iterations}+{solver.phantom_steps}"
        phases.append(Phase(phase.name, solver, end - phase.start, passes))
    return phases


class Planner:
    """Costs of layouts of one run on one cluster.

    Args:
        config: resolved, with a known vocabulary; its tokens are the budget.
        cluster: the machines.
        free: evaluations of phases that stop at a tolerance.

    Raises:
        ConfigError: the size of the vocabulary is not known.
    """

    def __init__(self, config: Config, cluster: Cluster, free: Evaluations = FREE) -> None:
        self.config, self.cluster = config, cluster
        self.phases = phases_of(config)
        self.evaluations = [evaluations_of(phase.solver, free) for phase in self.phases]

        if config.model.vocab_size is None:
            raise ConfigError("model.vocab_size is not set and a plan opens no tokenizer: add --model.vocab_size N")

    def memory_left(self) -> float:
        """Bytes of a device that a layout may use."""
        return self.cluster.memory_bytes * (1 - self.cluster.assumed.reserved_memory)

    def layers(self, layout: Layout) -> tuple[int, ...]:
        """The split with which the run takes least, all phases by their share; the head is on the last stage."""
        if layout.pipeline == 1:
            return (self.config.model.num_layers,)
        timing = Timing(applied(self.config, layout), layout, self.cluster)
        work = []
        for phase, evaluations in zip(self.phases, self.evaluations):
            passes = gradient_passes(self.config, phase.solver)
            costs = timing.stage(1, phase.solver, first=False, last=True)
            last = costs.judge * (evaluations.mean + passes) + costs.head
            work.append(Work(phase.share, _layer_work(costs, evaluations.mean, passes), last))
        return balanced_layers(self.config.model.num_layers, layout.pipeline, work)

    def fits(self, layout: Layout, layers: tuple[int, ...]) -> bool:
        """Whether every phase stays within the device's memory."""
        config = applied(self.config, layout)
        return all(
            peak_memory(config, layout, layers, phase.solver).total <= self.memory_left() for phase in self.phases
        )

    def plan(self, layout: Layout, layers: Optional[tuple[int, ...]] = None, *, ideal: bool = False) -> Plan:
        """Costs of a layout.

        Args:
            layout: the division.
            layers: of each stage; None balances them.
            ideal: as if no stage ever waited, without simulating: less than any schedule can take.
        """
        layers = layers or self.layers(layout)
        costs = (self._cost(layout, layers, index, ideal) for index in range(len(self.phases)))
        return Plan(layout, layers, tuple(costs))

    def _cost(self, layout: Layout, layers: tuple[int, ...], index: int, ideal: bool) -> PhaseCost:
        config, phase, evaluations = applied(self.config, layout), self.phases[index], self.evaluations[index]
        timing = Timing(config, layout, self.cluster)
        stages = [
            timing.stage(count, phase.solver, first=stage == 0, last=stage == layout.pipeline - 1)
            for stage, count in enumerate(layers)
        ]
        step = _Step(config, layout, layers, phase.solver, evaluations, timing, stages)
        passes_s, bubble = step.ideal() if ideal else step.passes()
        gradients = max(timing.gradients(n, first=f, last=l) for n, f, l in _ends(layers))
        optimizer = max(timing.optimizer(n, first=f, last=l) for n, f, l in _ends(layers))
        step_s = passes_s + gradients + optimizer
        steps = round(phase.share * config.train.steps)
        tokens = config.train.global_batch_size * config.data.sequence_length
        flops = timing.flops.training(evaluations.mean, gradient_passes(config, phase.solver)) * tokens
        return PhaseCost(
            phase, evaluations.mean, peak_memory(config, layout, layers, phase.solver), bubble,
            step.collectives(), gradients, step_s, steps, steps * step_s * self.cluster.world / 3600,
            flops / (step_s * self.cluster.world * self.cluster.peak),
        )  # fmt: skip


def _ends(layers: tuple[int, ...]) -> Iterator[tuple[int, bool, bool]]:
    for stage, count in enumerate(layers):
        yield count, stage == 0, stage == len(layers) - 1


def _layer_work(costs: StageCosts, evaluations: float, passes: int) -> float:
    """Seconds of a microbatch on a stage without what its ends have on top."""
    return evaluations * costs.solve + passes * (costs.phantom + costs.backward)


@dataclass(frozen=True)
class _Step:
    """Forward and backward passes of one replica's microbatches."""

    config: Config
    layout: Layout
    layers: tuple[int, ...]
    solver: SolverConfig
    evaluations: Evaluations
    timing: Timing
    stages: list[StageCosts]

    @property
    def microbatches(self) -> int:
        """M."""
        return self.layout.microbatches(self.config)

    @property
    def gradient_passes(self) -> int:
        """k."""
        return gradient_passes(self.config, self.solver)

    def ideal(self) -> tuple[float, float]:
        """(seconds, 0): the mean of the stages' work."""
        return self._slowed(sum(self._work()) / len(self.stages)), 0.0

    def passes(self) -> tuple[float, float]:
        """(seconds, bubble)."""
        work = self._work()
        if self.layout.pipeline == 1:
            return self._slowed(work[0]), 0.0
        seconds = self._simulated() if self.config.implicit else self._one_forward_one_backward()
        weights = self._weights()
        bubble = 1 - (sum(work) / len(work) - weights) / seconds
        return self._slowed(seconds + weights), bubble

    def collectives(self) -> float:
        """Seconds of the tensor group's collectives in a step, on the stage with the most layers."""
        timing, layers, k = self.timing, max(self.layers), self.gradient_passes
        forward = self.evaluations.mean + k * (2 if self.layout.recompute != "none" else 1)
        passes = forward * timing.layer_collectives + k * timing.layer_backward_collectives
        return self.microbatches * layers * passes

    def _work(self) -> list[float]:
        """Seconds each stage computes in a step."""
        mean, k = self.evaluations.mean, self.gradient_passes
        ends = [
            (mean + k) * costs.judge + costs.admission + costs.admission_backward + costs.head
            for costs in self.stages
        ]
        layers = (_layer_work(costs, mean, k) for costs in self.stages)
        return [self.microbatches * (own + end) + self._weights() for own, end in zip(layers, ends)]

    def _weights(self) -> float:
        """Weight norm: once a microbatch, on a pipeline once a step."""
        times = self.microbatches if self.layout.pipeline == 1 else 1
        return times * self.timing.weights(max(self.layers))

    def _simulated(self) -> float:
        """The recirculating schedule, by its simulator."""
        if self.microbatches <= MOST_SIMULATED:
            return self._makespan(self.microbatches)
        whole, half = self._makespan(MOST_SIMULATED), self._makespan(MOST_SIMULATED // 2)
        return whole + (self.microbatches - MOST_SIMULATED) * (whole - half) / (MOST_SIMULATED - MOST_SIMULATED // 2)

    def _makespan(self, microbatches: int) -> float:
        unrolled = self.solver.gradient == "unrolled"
        plan = StepPlan(self.layout.pipeline, microbatches, self.gradient_passes, self.layout.limits, unrolled)
        draw = self.evaluations.draw(microbatches)
        return simulate(plan, draw, PartCosts(plan, self.stages), self.timing.links()).makespan

    def _one_forward_one_backward(self) -> float:
        """1F1B of an explicit model: the busiest stage without a break, and one microbatch's way through the others."""
        work = [(one - self._weights()) / self.microbatches for one in self._work()]
        links = self.timing.links()
        hops = sum(self._hop(links, stage) for stage in range(self.layout.pipeline - 1))
        return (self.microbatches - 1) * max(work) + sum(work) + 2 * hops

    def _hop(self, links, stage: int) -> float:
        link = links.link(stage, stage + 1)
        return link.latency + links.tensor_bytes / link.bandwidth

    def _slowed(self, seconds: float) -> float:
        """All replicas wait for the one whose solves take longest: the share of time in solves grows by that much."""
        solving = self.evaluations.mean * self.stages[0].solve
        whole = _layer_work(self.stages[0], self.evaluations.mean, self.gradient_passes)
        slowest = self.evaluations.of_slowest(self.microbatches, self.layout.data)
        return seconds * (1 + (slowest - 1) * solving / whole)

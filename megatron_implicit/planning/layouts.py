"""Divisions of a job over its devices, and of the layers over the stages."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Iterator, Optional, Sequence

from megatron_implicit.config import Config
from megatron_implicit.config.validate import validate, validate_world
from megatron_implicit.errors import ConfigError
from megatron_implicit.planning.cluster import Cluster
from megatron_implicit.schedules.protocol import Limits


@dataclass(frozen=True)
class Layout:
    """How a job is divided."""

    tensor: int
    pipeline: int
    data: int
    micro_batch_size: int
    sequence: bool
    """Sequence parallelism."""
    recompute: str
    """none, layer or pass."""
    limits: Optional[Limits] = None
    """W, G, g of the recirculating schedule; None where it does not run."""

    def arguments(self, layers: tuple[int, ...]) -> list[str]:
        """What launch/pretrain.py is told to take this layout."""
        values: dict[str, object] = {
            "parallel.tensor": self.tensor,
            "parallel.sequence": str(self.sequence).lower(),
            "parallel.recompute": self.recompute,
            "parallel.pipeline": self.pipeline,
            "train.micro_batch_size": self.micro_batch_size,
        }
        if self.pipeline > 1:
            values["parallel.layers_per_stage"] = "[" + ",".join(map(str, layers)) + "]"
        if self.limits is not None:
            values["parallel.microbatches_in_flight"] = self.limits.solving
        return [f"--{key}={value}" for key, value in values.items()]

    def microbatches(self, config: Config) -> int:
        """M of a replica."""
        return config.train.global_batch_size // (self.data * self.micro_batch_size)


def layout_of(config: Config, cluster: Cluster) -> Layout:
    """The configuration's own layout on a cluster; ``parallel.layers_per_stage`` has its layers.

    Raises:
        ConfigError: it does not fit the cluster's devices or the batch.
    """
    validate_world(config, cluster.world)
    parallel = config.parallel
    limits = None
    if parallel.pipeline > 1 and config.implicit:
        limits = Limits.default(parallel.pipeline, parallel.microbatches_in_flight)
    return Layout(
        parallel.tensor, parallel.pipeline, cluster.world // (parallel.tensor * parallel.pipeline),
        config.train.micro_batch_size, parallel.sequence, parallel.recompute, limits,
    )  # fmt: skip


def possible_layouts(config: Config, cluster: Cluster) -> Iterator[Layout]:
    """All layouts that divide the devices, the batch and the model; memory is not looked at.

    A tensor group stays inside a node: its collectives are on the path of every layer.
    """
    model, batch = config.model, config.train.global_batch_size
    for tensor in _divisors(cluster.devices):
        for pipeline in _divisors(cluster.world // tensor):
            data = cluster.world // (tensor * pipeline)
            if pipeline > model.num_layers or batch % data:
                continue
            for micro in (size for size in _divisors(batch // data) if size & (size - 1) == 0):
                for sequence in (True, False) if tensor > 1 else (False,):
                    for recompute in ("none", "layer", "pass"):
                        layout = Layout(tensor, pipeline, data, micro, sequence, recompute)
                        if _is_valid(config, layout):
                            yield from _with_limits(config, layout)


def applied(config: Config, layout: Layout) -> Config:
    """A copy of the configuration with a layout."""
    config = copy.deepcopy(config)
    parallel = config.parallel
    parallel.tensor, parallel.pipeline = layout.tensor, layout.pipeline
    parallel.sequence, parallel.recompute = layout.sequence, layout.recompute
    if layout.limits is not None:
        parallel.microbatches_in_flight = layout.limits.solving
    config.train.micro_batch_size = layout.micro_batch_size
    return config


@dataclass(frozen=True)
class Work:
    """What stages have to do in a phase; seconds of a microbatch, or any unit."""

    weight: float
    """Share of the run's microbatches."""
    layer: float
    """Of each layer."""
    last: float
    """Of the last stage on top: head and judge."""


def balanced_layers(layers: int, stages: int, phases: Sequence[Work]) -> tuple[int, ...]:
    """Layers of each stage, at least one, for which the run takes least: in each phase all wait for its busiest stage.

    The last stage's number is tried out; the others share the rest evenly, the first ones less, since stage 0 embeds.
    """
    candidates = (_others_even(layers, stages, last) for last in range(1, layers - stages + 2))

    def seconds(split: tuple[int, ...]) -> float:
        return sum(
            phase.weight * max(max(split[:-1]) * phase.layer, split[-1] * phase.layer + phase.last) for phase in phases
        )

    # Among equals the one whose last stage has most layers: the head comes in one piece, other passes stay long.
    return min(reversed(list(candidates)), key=seconds)


def _others_even(layers: int, stages: int, last: int) -> tuple[int, ...]:
    share, left_over = divmod(layers - last, stages - 1)
    return (*(share + (stage >= stages - 1 - left_over) for stage in range(stages - 1)), last)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _is_valid(config: Config, layout: Layout) -> bool:
    candidate = applied(config, layout)
    # Any number of stages up to that of the layers, whose split is chosen later.
    candidate.parallel.pipeline, candidate.parallel.layers_per_stage = 1, [config.model.num_layers]
    try:
        validate(candidate)
    except ConfigError:
        return False
    return True


def _with_limits(config: Config, layout: Layout) -> Iterator[Layout]:
    """The schedule's default limits, and twice as many microbatches solving: less bubble for more memory."""
    if layout.pipeline == 1 or not config.implicit:
        yield layout
        return
    for solving in (2 * layout.pipeline, 4 * layout.pipeline):
        yield replace(layout, limits=Limits.default(layout.pipeline, solving))

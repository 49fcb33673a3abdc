"""The best layouts of a run on a cluster, without simulating those that cannot be among them."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from megatron_implicit.errors import ConfigError
from megatron_implicit.planning.layouts import Layout, possible_layouts
from megatron_implicit.planning.plan import Plan, Planner


@dataclass(frozen=True)
class Found:
    """What a search found."""

    plans: list[Plan]
    """The best layouts, fewest GPU hours first."""
    feasible: int
    """Layouts that fit into the devices' memory."""
    possible: int
    """Layouts that divide devices, batch and model."""


def best_plans(planner: Planner, count: int) -> Found:
    """The ``count`` layouts with the fewest GPU hours.

    Every layout's hours without any waiting are a bound that needs no simulation; layouts are simulated in its order
    until the bound exceeds the worst of the best. Of layouts that differ in what they recompute alone, only the one
    that recomputes least is looked at: recomputing buys memory and nothing else.

    Raises:
        ConfigError: no layout fits.
    """
    possible = list(possible_layouts(planner.config, planner.cluster))
    feasible = _feasible(planner, possible)
    if not feasible:
        raise ConfigError(
            f"no layout of {planner.config.model.family} {planner.config.model.size} fits {planner.cluster.world} x "
            f"{planner.cluster.device} with {planner.memory_left() / 1e9:.0f} GB usable each: add nodes or memory, or "
            "change train.global_batch_size"
        )
    bounded = sorted((planner.plan(layout, layers, ideal=True) for layout, layers in feasible), key=_hours)
    best: list[Plan] = []
    for bound in bounded:
        if len(best) >= count and bound.gpu_hours >= best[count - 1].gpu_hours:
            break
        bisect.insort(best, planner.plan(bound.layout, bound.layers), key=_hours)
    return Found(best[:count], len(feasible), len(possible))


def _hours(plan: Plan) -> float:
    return plan.gpu_hours


def _feasible(planner: Planner, layouts: list[Layout]) -> list[tuple[Layout, tuple[int, ...]]]:
    kept: dict[tuple, tuple[Layout, tuple[int, ...]]] = {}
    for layout in layouts:  # in order of growing recomputation
        key = _but_for_recomputation(layout)
        if key not in kept and planner.fits(layout, layers := planner.layers(layout)):
            kept[key] = (layout, layers)
    return list(kept.values())


def _but_for_recomputation(layout: Layout) -> tuple:
    return tuple(value for name, value in vars(layout).items() if name != "recompute")

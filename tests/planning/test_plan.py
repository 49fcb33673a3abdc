"""Plans: splits, evaluations, searches and the run's arithmetic."""

from __future__ import annotations

import itertools

import pytest

from megatron_implicit.config import load_config
from megatron_implicit.errors import ConfigError
from megatron_implicit.planning.cluster import Assumptions, Cluster
from megatron_implicit.planning.evaluations import FREE, evaluations_of, parse_evaluations
from megatron_implicit.planning.layouts import Layout, Work, balanced_layers, layout_of, possible_layouts
from megatron_implicit.planning.plan import Planner, phases_of
from megatron_implicit.planning.search import best_plans
from megatron_implicit.schedules.protocol import Limits


def _planner(family: str = "implicit_mamba2", size: str = "1.3b", *arguments: str, **cluster: float) -> Planner:
    config = load_config(["--config", f"launch/configs/{family}_{size}.yaml", *arguments])
    given = {"nodes": 4, "devices": 8, "between": 50e9} | cluster
    return Planner(config, Cluster.of_device("MI300X", "bf16", **given))


def test_the_split_is_the_best_of_all() -> None:
    """Against every split of a few layers, for two phases in which the head weighs differently."""
    phases = [Work(0.8, 7.0, 25.0), Work(0.2, 25.0, 26.0)]

    def seconds(split: tuple[int, ...]) -> float:
        extra = (0,) * (len(split) - 1) + (1,)
        return sum(p.weight * max(n * p.layer + e * p.last for n, e in zip(split, extra)) for p in phases)

    for layers, stages in [(24, 4), (13, 3), (5, 4), (7, 2)]:
        split = balanced_layers(layers, stages, phases)
        every = (cut for cut in itertools.product(range(1, layers), repeat=stages) if sum(cut) == layers)
        assert sum(split) == layers
        assert seconds(split) == pytest.approx(min(map(seconds, every)))


def test_evaluations_are_drawn_as_often_as_their_shares_say() -> None:
    draw = FREE.draw(200)
    assert [draw.count(number) for number, _ in FREE.shares] == [round(200 * share) for _, share in FREE.shares]
    assert sum(draw) / 200 == pytest.approx(FREE.mean, abs=0.05)
    assert FREE.draw(7) == FREE.draw(7) and len(FREE.draw(7)) == 7
    assert FREE.at_most(12).mean < FREE.mean
    assert FREE.of_slowest(64, 1) == 1.0 < FREE.of_slowest(64, 8) < FREE.of_slowest(8, 8)


@pytest.mark.parametrize("text", ["", "x", "0", "8:0.5", "8:0.5,12:0.6", "8:0.5;12:0.5"])
def test_wrong_evaluations_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="like 8:0.2"):
        parse_evaluations(text)
    assert parse_evaluations("8:0.25,16:0.75").mean == 14 and parse_evaluations("12").mean == 12


def test_the_bounded_phase_has_fixed_counts_and_shares_add_up() -> None:
    bounded, free = phases_of(_planner().config)
    assert (bounded.passes, free.passes) == ("4+1", "24+4")
    assert evaluations_of(bounded.solver).shares == ((4, 1.0),)
    assert evaluations_of(free.solver) == FREE
    assert bounded.share + free.share == 1.0 == phases_of(_planner("explicit_llama").config)[0].share


def test_a_step_without_pipeline_is_the_sum_of_its_parts() -> None:
    """Of one device without collectives: model FLOPs at the peak, when nothing but products takes time."""
    assumed = Assumptions(compute_efficiency=1.0, memory_efficiency=1e9, decision=0.0)
    config = load_config(["--config", "launch/configs/implicit_llama_130m.yaml"])
    cluster = Cluster.of_device("H100", "bf16", nodes=1, devices=1, between=1e9, assumed=assumed)
    plan = Planner(config, cluster).plan(Layout(1, 1, 1, 8, False, "none"))
    assert [phase.mfu for phase in plan.phases] == pytest.approx([1.0, 1.0], rel=1e-6)
    seconds = sum(phase.step_s * phase.steps for phase in plan.phases)
    assert plan.gpu_hours == pytest.approx(seconds / 3600)
    assert sum(phase.steps for phase in plan.phases) == config.train.steps


def test_a_pipeline_pays_a_bubble_and_saves_memory() -> None:
    planner = _planner("implicit_mamba2", "130m")
    alone = planner.plan(Layout(2, 1, 16, 2, True, "none"))
    staged = planner.plan(Layout(2, 4, 4, 2, True, "none", Limits.default(4)))
    assert alone.phases[0].bubble == 0 < staged.phases[0].bubble < 0.25
    assert staged.layers[-1] < staged.layers[0], "the head is on the last stage"
    assert staged.memory.parameters < alone.memory.parameters
    assert planner.plan(staged.layout, ideal=True).gpu_hours < staged.gpu_hours


def test_an_explicit_pipeline_has_the_bubble_of_one_forward_one_backward() -> None:
    planner = _planner("explicit_llama", "1.3b", "--model.vocab_size", "64", "--model.num_layers", "240", between=1e18)
    plan = planner.plan(Layout(1, 4, 8, 1, False, "none"))
    assert plan.phases[0].bubble == pytest.approx(3 / (64 + 3), abs=2e-3)


def test_the_search_is_exact_and_sorted() -> None:
    """Against planning everything that fits, on a small cluster."""
    planner = _planner("implicit_llama", "130m", "--train.global_batch_size", "16", nodes=1, devices=4)
    found = best_plans(planner, 3)
    fitting = [layout for layout in possible_layouts(planner.config, planner.cluster) if layout.recompute == "none"]
    every = sorted(planner.plan(layout).gpu_hours for layout in fitting if planner.fits(layout, planner.layers(layout)))
    assert [plan.gpu_hours for plan in found.plans] == every[:3]


def test_memory_decides_what_is_recomputed_and_what_fits() -> None:
    deep = ("--model.num_layers", "96", "--train.global_batch_size", "16")
    tight = best_plans(_planner("implicit_llama", "1.3b", *deep, nodes=1, memory_bytes=24e9), 1).plans[0]
    assert tight.memory.total <= 0.9 * 24e9 and tight.layout.recompute != "none"
    with pytest.raises(ConfigError, match="no layout of implicit_llama 1.3b fits"):
        best_plans(_planner("implicit_llama", "1.3b", memory_bytes=1e9), 1)


def test_the_configurations_own_layout() -> None:
    planner = _planner()
    layout = layout_of(planner.config, planner.cluster)
    assert (layout.tensor, layout.pipeline, layout.data, layout.micro_batch_size) == (2, 1, 16, 2)
    staged = Layout(2, 4, 4, 2, True, "layer", Limits.default(4, 12))
    config = _planner("implicit_mamba2", "1.3b", *staged.arguments((13, 13, 13, 9))).config
    assert layout_of(config, planner.cluster) == staged
    assert config.parallel.layers_per_stage == [13, 13, 13, 9]
    with pytest.raises(ConfigError, match="multiple"):
        layout_of(planner.config, Cluster.of_device("H200", "bf16", nodes=1, devices=3, between=1e9))


def test_a_device_without_a_data_sheet_needs_its_values() -> None:
    with pytest.raises(ConfigError, match="--peak-tflops"):
        Cluster.of_device("Unknown", "bf16", nodes=1, devices=8, between=1e9)
    with pytest.raises(ConfigError, match="--nodes"):
        Cluster.of_device("H100", "bf16", nodes=0, devices=8, between=1e9)

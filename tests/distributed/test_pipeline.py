"""The recirculating schedule trains implicit models as one process does, whatever the stages."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch

from megatron_implicit.config import Config, config_from_dict, config_to_dict
from tests import goldens, traces
from tests.distributed.test_golden_tensor_parallel import check_golden_training

LONG = pytest.mark.acceptance
STEPS = 20
LAYERS = 5


@dataclass
class Run:
    """One step, for its numbers before anything drifts, and the steps after it."""

    first: traces.Trace
    rest: traces.Trace


def pipeline_config(family: str) -> Config:
    """The golden training run with more layers and four microbatches a step; its free phase begins at step 16."""
    values = config_to_dict(traces.golden_training_config(family))
    values["model"]["num_layers"] = LAYERS
    values["train"]["micro_batch_size"] = 1
    values["parallel"] |= {"layers_per_stage": None, "microbatches_in_flight": None}
    return config_from_dict(values)


def train(family: str, layout: traces.Layout) -> Run:
    """From the seed's initialisation."""
    config = layout.apply(pipeline_config(family))
    tokens = torch.from_numpy(goldens.arrays(f"{family}_training")["tokens"])[:STEPS]
    parts = traces.prepare(config, None)
    first = traces.train(config, parts, tokens[:1])
    return Run(first, traces.train(config, parts, tokens[1:], first_step=2))


@functools.lru_cache(maxsize=None)
def one(family: str) -> Run:
    """The same on this process."""
    return train(family, traces.Layout())


@dataclass(frozen=True)
class Case:
    """A layout on some processes."""

    world: int
    layout: traces.Layout
    long_for: tuple[str, ...] = ()
    """Families for which it is run under --acceptance only."""


BOTH = tuple(goldens.IMPLICIT)
MAMBA2, LLAMA = BOTH
CASES = {
    "PP2": Case(2, traces.Layout(pipeline=2, layers_per_stage=[3, 2])),
    "PP2 uneven, two in flight, recomputed": Case(
        2, traces.Layout(pipeline=2, layers_per_stage=[4, 1], microbatches_in_flight=2, recompute="layer"), (LLAMA,)
    ),
    "PP3": Case(3, traces.Layout(pipeline=3, layers_per_stage=[2, 2, 1]), (MAMBA2,)),
    "PP4": Case(4, traces.Layout(pipeline=4, layers_per_stage=[2, 1, 1, 1]), BOTH),
    "PP4 uneven": Case(4, traces.Layout(pipeline=4, layers_per_stage=[1, 1, 2, 1]), BOTH),
    "TP2xPP2": Case(4, traces.Layout(tensor=2, pipeline=2), BOTH),
    "TP2+SPxPP2": Case(4, traces.Layout(tensor=2, pipeline=2, sequence=True), BOTH),
    "PP2xDP2": Case(4, traces.Layout(pipeline=2), BOTH),
    "PP2xDP2 distributed optimizer": Case(4, traces.Layout(pipeline=2, distributed_optimizer=True), BOTH),
}
RUNS = [
    pytest.param(family, name, id=f"{family}-{name}", marks=[LONG] if family in case.long_for else [])
    for name, case in CASES.items()
    for family in BOTH
]


@pytest.mark.parametrize("family, name", RUNS)
def test_training_is_the_same_on_stages(pool, one_process: None, family: str, name: str) -> None:
    case, expected = CASES[name], one(family)
    assert expected.first.grad_norms[0] > 1.5 * pipeline_config(family).optimizer.clip_grad_norm  # clipping is active
    for run in pool(case.world).run(train, family, case.layout):
        check_first_step(run.first, expected.first, case.layout)
        assert run.rest.iterations == expected.rest.iterations
        assert run.rest.evaluations == expected.rest.evaluations
        for loss, other in zip(run.rest.losses, expected.rest.losses, strict=True):
            assert abs(loss / other - 1) <= 1e-5
        for norm, other in zip(run.rest.grad_norms, expected.rest.grad_norms, strict=True):
            assert abs(norm / other - 1) <= 1e-4
    assert len({count for counts in expected.rest.evaluations[-4:] for count in counts}) > 1  # they do differ


def check_first_step(step: traces.Trace, expected: traces.Trace, layout: traces.Layout) -> None:
    """Identical but for the order of sums, which tensor parallelism changes within a layer, stages and replicas in
    gradients only."""
    assert step.iterations == expected.iterations
    assert step.evaluations == expected.evaluations
    rounding = 1e-6 if layout.tensor > 1 else 0.0
    assert step.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
    for sample, other in zip(step.residuals[0], expected.residuals[0], strict=True):
        assert sample == pytest.approx(other, rel=rounding, abs=0.0)
    if not layout.distributed_optimizer:  # there each replica holds a part of the averaged gradient
        assert relative_distance(step.gradients, expected.gradients) <= 1e-6


def relative_distance(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 of all gradients together; no single one is far off either."""
    assert values.keys() == expected.keys()
    squares = {key: (float((values[key] - other).norm()), float(other.norm())) for key, other in expected.items()}
    for key, (distance, size) in squares.items():
        assert distance <= 5e-6 * size, key
    return math.dist([d for d, _ in squares.values()], [0.0] * len(squares)) / math.hypot(
        *(size for _, size in squares.values())
    )


@pytest.mark.parametrize("family", [MAMBA2, pytest.param(LLAMA, marks=LONG)])
def test_bf16_training_on_stages_follows_one_process(pool, one_process: None, family: str) -> None:
    """x travels in bf16, iterates and gradients in fp32."""
    expected = first_steps(family, traces.Layout(precision="bf16"))
    for trace in pool(2).run(first_steps, family, traces.Layout(pipeline=2, precision="bf16")):
        assert trace.losses == pytest.approx(expected.losses, rel=1e-3)
        assert trace.grad_norms == pytest.approx(expected.grad_norms, rel=1e-2)
        assert trace.evaluations == expected.evaluations


def first_steps(family: str, layout: traces.Layout) -> traces.Trace:
    """Five steps of the bounded phase."""
    config = layout.apply(pipeline_config(family))
    tokens = torch.from_numpy(goldens.arrays(f"{family}_training")["tokens"])[:5]
    return traces.train(config, traces.prepare(config, None), tokens)


GOLDEN = {
    "PP2": (2, traces.Layout(pipeline=2)),
    "TP2xPP2": (4, traces.Layout(tensor=2, pipeline=2)),
}


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("name", ["PP2", pytest.param("TP2xPP2", marks=LONG)])
def test_training_traces_match_the_reference(pool, family: str, name: str) -> None:
    world, layout = GOLDEN[name]
    for trace in pool(world).run(traces.run_golden_training, family, layout):
        check_golden_training(trace, family)

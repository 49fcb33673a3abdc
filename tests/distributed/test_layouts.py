"""Training and checkpoints do not depend on the layout: losses, gradients, updates, counts; uneven sizes included."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from megatron_implicit.checkpoint import CheckpointFolder, TrainingState, load_training_state, save_checkpoint
from megatron_implicit.config import Config, config_from_dict, config_to_dict
from tests import goldens, traces

ONE = traces.Layout()
TENSOR = traces.Layout(tensor=2)
SEQUENCE = traces.Layout(tensor=2, sequence=True)
SHARDED = traces.Layout(distributed_optimizer=True)
TENSOR_SHARDED = traces.Layout(tensor=2, distributed_optimizer=True)
LAYOUTS = {
    "TP2": (2, TENSOR),
    "TP2+SP": (2, SEQUENCE),
    "DP2": (2, ONE),
    "TP2xDP2": (4, TENSOR),
    "DP2 distributed optimizer": (2, SHARDED),
}
VOCABULARY, FFN = 131, 85


def uneven_config(family: str) -> Config:
    """The golden training run with a vocabulary, and for Llama an FFN, that no tensor size divides."""
    values = config_to_dict(traces.golden_training_config(family))
    values["model"]["vocab_size"] = VOCABULARY
    if family.endswith("llama"):
        values["model"]["ffn_size"] = FFN
    return config_from_dict(values)


@functools.lru_cache(maxsize=None)
def tokens(steps: int = 30) -> torch.Tensor:
    """Random tokens over the whole uneven vocabulary, [steps, 4, 25]."""
    return torch.randint(0, VOCABULARY, (steps, 4, 25), generator=torch.Generator().manual_seed(3))


def train_uneven(family: str, layout: traces.Layout) -> traces.Trace:
    """30 steps from the seed's initialisation."""
    config = layout.apply(uneven_config(family))
    return traces.train(config, traces.prepare(config, None), tokens())


@functools.lru_cache(maxsize=None)
def long_run(family: str) -> traces.Trace:
    """The same run on this process."""
    return train_uneven(family, ONE)


LONG = pytest.mark.acceptance
LONG_RUNS = [pytest.param("implicit_mamba2", name, id=f"mamba2-{name}") for name in LAYOUTS] + [
    pytest.param("implicit_llama", name, id=f"llama-{name}", marks=[] if name == "TP2" else LONG) for name in LAYOUTS
]


@pytest.mark.parametrize("family, name", LONG_RUNS)
def test_training_is_the_same_on_every_layout(pool, one_process, family: str, name: str) -> None:
    expected = long_run(family)
    world_size, layout = LAYOUTS[name]
    ranks = pool(world_size).run(train_uneven, family, layout)
    for trace in ranks:
        assert trace.iterations == expected.iterations
        assert trace.evaluations == expected.evaluations
        assert _relative(trace.losses, expected.losses) <= 1e-5
        assert _relative(trace.grad_norms, expected.grad_norms) <= 1e-4
        # Adam divides rounding by rounding where a gradient is nearly zero: the bias of k reaches 1.3e-4.
        _assert_close(trace.parameters, expected.parameters, 1e-3)
        if not layout.distributed_optimizer:  # there each replica holds a part of the averaged gradient
            _assert_close(trace.gradients, expected.gradients, 1e-3)


def test_first_gradients_and_update_are_the_same_with_uneven_sizes(pool, one_process: None) -> None:
    for family in goldens.IMPLICIT:
        expected = first_step(family, ONE)
        for trace in pool(2).run(first_step, family, TENSOR):
            _assert_close(trace.gradients, expected.gradients, 5e-5)
            _assert_close(trace.parameters, expected.parameters, 5e-5)


def first_step(family: str, layout: traces.Layout) -> traces.Trace:
    """One step, so that gradients have not yet had the chance to drift."""
    config = layout.apply(uneven_config(family))
    return traces.train(config, traces.prepare(config, None), tokens()[:1])


def _relative(values: list[float], expected: list[float]) -> float:
    return max(abs(value / other - 1) for value, other in zip(values, expected, strict=True))


def _assert_close(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert values.keys() == expected.keys()
    for key, other in expected.items():
        assert values[key].shape == other.shape, key
        assert float((values[key] - other).norm()) <= tolerance * float(other.norm()) + 1e-9, key


STEPS, HALF = 8, 3
"""A shorter run for checkpoints: saved one step before the phase switches."""


def short_config(family: str) -> Config:
    """The uneven run over eight steps."""
    values = config_to_dict(uneven_config(family))
    values["train"] |= {"steps": STEPS, "tokens": None}
    return config_from_dict(values)


def train_whole(family: str, layout: traces.Layout) -> traces.Trace:
    """The short run without interruption."""
    config = layout.apply(short_config(family))
    return traces.train(config, traces.prepare(config, None), tokens()[:STEPS])


def train_and_save(family: str, layout: traces.Layout, folder: str) -> None:
    """Trains the first steps and saves."""
    config = layout.apply(short_config(family))
    parts = traces.prepare(config, None)
    traces.train(config, parts, tokens()[:HALF])
    state = TrainingState(step=HALF)
    save_checkpoint(CheckpointFolder(Path(folder)), config, state, parts.model.module, parts.optimizer, parts.scheduler)


def load_and_train(family: str, layout: traces.Layout, folder: str, same_layout: bool) -> traces.Trace:
    """Loads and trains the rest."""
    config = layout.apply(short_config(family))
    parts = traces.prepare(config, None)
    step_folder = CheckpointFolder(Path(folder)).latest()
    load_training_state(step_folder, parts.model.module, parts.optimizer, parts.scheduler, same_layout=same_layout)
    return traces.train(config, parts, tokens()[HALF:STEPS], first_step=HALF + 1)


RESHARDINGS = [
    ("TP1 to TP2+SP", 1, ONE, 2, SEQUENCE),
    ("TP2 to TP1", 2, TENSOR, 1, ONE),
    ("DP2 distributed optimizer to TP2", 2, SHARDED, 2, TENSOR_SHARDED),
    ("TP2xDP2 distributed optimizer to DP2 distributed optimizer", 4, TENSOR_SHARDED, 2, SHARDED),
]


@functools.lru_cache(maxsize=None)
def whole_run(family: str) -> traces.Trace:
    """The short run on this process."""
    return train_whole(family, ONE)


RESHARDING_RUNS = [
    # Each once by default, families in turn: the Llama has the uneven FFN, the Mamba2 the replicated B and C.
    pytest.param(family, *case[1:], id=f"{family}-{case[0]}", marks=[] if (index + turn) % 2 == 0 else LONG)
    for index, case in enumerate(RESHARDINGS)
    for turn, family in enumerate(goldens.IMPLICIT)
]


@pytest.mark.parametrize("family, world, saved, new_world, loaded", RESHARDING_RUNS)
def test_a_checkpoint_continues_on_another_layout(
    pool, tmp_path, one_process, family: str, world: int, saved: traces.Layout, new_world: int,
    loaded: traces.Layout,
) -> None:  # fmt: skip
    expected = whole_run(family)
    pool(world).run(train_and_save, family, saved, str(tmp_path))
    for trace in pool(new_world).run(load_and_train, family, loaded, str(tmp_path), False):
        assert _relative(trace.losses, expected.losses[HALF:]) <= 1e-5
        assert trace.iterations == expected.iterations[HALF:]
        assert trace.evaluations == expected.evaluations[HALF:]


OWN_LAYOUTS = {
    "TP2+SP": SEQUENCE,
    "PP2": traces.Layout(pipeline=2),
    "DP2 distributed optimizer": SHARDED,
    "DP2 bf16": traces.Layout(precision="bf16"),
}


@pytest.mark.parametrize("layout", OWN_LAYOUTS.values(), ids=OWN_LAYOUTS)
def test_a_checkpoint_continues_bit_for_bit_on_its_own_layout(pool, tmp_path, layout: traces.Layout) -> None:
    family = "implicit_llama" if layout.precision == "bf16" else "implicit_mamba2"
    whole = pool(2).run(train_whole, family, layout)
    pool(2).run(train_and_save, family, layout, str(tmp_path))
    for trace, uninterrupted in zip(pool(2).run(load_and_train, family, layout, str(tmp_path), True), whole):
        assert trace.losses == uninterrupted.losses[HALF:]
        assert trace.grad_norms == uninterrupted.grad_norms[HALF:]
        for key, value in uninterrupted.parameters.items():
            assert torch.equal(trace.parameters[key], value), key

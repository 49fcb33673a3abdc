"""Training and checkpoints on pipeline stages are those of one process: losses, gradients, updates, copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_implicit.api import load_pretrained
from megatron_implicit.checkpoint import CheckpointFolder, TrainingState, load_training_state, save_checkpoint
from megatron_implicit.conversion.reference import gather_reference
from megatron_implicit.layers.sharding import placed_parameters
from megatron_implicit.models.initialisation import named_modules_globally
from megatron_implicit.training.validation import measure_loss
from tests import goldens, traces
from tests.distributed import test_layouts as layouts

PP2 = traces.Layout(pipeline=2)
UNEVEN = traces.Layout(pipeline=2, layers_per_stage=[1, 2])
PP3 = traces.Layout(pipeline=3)
BOTH = traces.Layout(tensor=2, pipeline=2)
BOTH_SEQUENCE = traces.Layout(tensor=2, pipeline=2, sequence=True)
SHARDED = traces.Layout(pipeline=2, distributed_optimizer=True)
ONE_SHARDED = traces.Layout(distributed_optimizer=True)
EXPLICIT = goldens.FAMILIES[2:]
LONG = pytest.mark.acceptance
STEPS = 6


def train_explicit(family: str, layout: traces.Layout) -> tuple[traces.Trace, float, dict[str, torch.Tensor]]:
    """The first steps of a run, the held-out loss after them, and the copies that several stages hold."""
    config = layout.apply(layouts.uneven_config(family))
    parts = traces.prepare(config, None)
    trace = traces.train(config, parts, layouts.tokens()[:STEPS])
    model = parts.model.module
    held_out = traces.microbatches(config, layouts.tokens()[STEPS])
    return trace, measure_loss(model, held_out, torch.device("cpu")).loss, copies(model)


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that several stages hold, by the name of the first copy and this rank's slice."""
    return {
        f"{name.replace('output_layer', 'embedding.word_embeddings')} {placement}": parameter.detach().clone()
        for name, parameter, placement, _ in placed_parameters(named_modules_globally(model))
        if getattr(parameter, "shared_embedding", False)
    }


def assert_copies_agree(ranks: list[dict[str, torch.Tensor]]) -> None:
    """Bit for bit, or they would drift apart."""
    for name in {name for rank in ranks for name in rank}:
        held = [rank[name] for rank in ranks if name in rank]
        assert len(held) > 1, name
        assert all(torch.equal(held[0], other) for other in held[1:]), name


@pytest.mark.parametrize(
    "family, world, layout",
    [
        pytest.param("explicit_mamba2", 2, UNEVEN, id="mamba2-PP2 uneven"),
        pytest.param("explicit_mamba2", 4, BOTH_SEQUENCE, id="mamba2-TP2+SPxPP2"),
        pytest.param("explicit_llama", 4, SHARDED, id="llama-PP2xDP2 distributed optimizer"),
        pytest.param("explicit_llama", 2, PP2, id="llama-PP2", marks=LONG),
        pytest.param("explicit_llama", 3, PP3, id="llama-PP3", marks=LONG),
        pytest.param("explicit_mamba2", 4, PP2, id="mamba2-PP2xDP2", marks=LONG),
    ],
)
def test_explicit_models_train_as_on_one_process(
    pool, one_process, family: str, world: int, layout: traces.Layout
) -> None:
    expected, held_out, _ = train_explicit(family, traces.Layout())
    ranks = pool(world).run(train_explicit, family, layout)
    for trace, loss, _ in ranks:
        assert layouts._relative(trace.losses, expected.losses) <= 1e-5
        assert layouts._relative(trace.grad_norms, expected.grad_norms) <= 1e-5
        assert abs(loss / held_out - 1) <= 1e-5
        layouts._assert_close(trace.parameters, expected.parameters, 1e-4)
    assert_copies_agree([rank[2] for rank in ranks])


def train_on(
    family: str, layout: traces.Layout, folder: str, steps: tuple[int, int]
) -> tuple[traces.Trace, dict[str, torch.Tensor]]:
    """Goes on from the folder's checkpoint, if it has one, and saves after the last of the steps."""
    config = layout.apply(layouts.short_config(family))
    checkpoints = CheckpointFolder(Path(folder))
    latest = checkpoints.latest()
    parts = traces.prepare(config, None)
    model = parts.model.module
    if latest is not None:
        load_training_state(latest, model, parts.optimizer, parts.scheduler, same_layout=False)
    first, last = steps
    trace = traces.train(config, parts, layouts.tokens()[first - 1 : last], first_step=first)
    state = TrainingState(step=last)
    save_checkpoint(checkpoints, config, state, model, parts.optimizer, parts.scheduler)
    return trace, copies(model)


ROUND_TRIP = ((2, layouts.TENSOR), (2, PP2), (1, traces.Layout()), (4, BOTH))
SHARDED_ROUND_TRIP = (
    (4, traces.Layout(pipeline=2, distributed_optimizer=True)),
    (2, traces.Layout(distributed_optimizer=True)),
    (2, traces.Layout(pipeline=2, layers_per_stage=[1, 2], distributed_optimizer=True)),
    (2, traces.Layout(tensor=2, distributed_optimizer=True)),
)
TRIPS = {"plain optimizer": ROUND_TRIP, "distributed optimizer": SHARDED_ROUND_TRIP}


ALWAYS = (("implicit_mamba2", "plain optimizer"), ("implicit_llama", "distributed optimizer"))
RUNS = [
    pytest.param(family, trip, id=f"{family}-{trip}", marks=[] if (family, trip) in ALWAYS else LONG)
    for family in goldens.FAMILIES
    for trip in TRIPS
]


@pytest.mark.parametrize("family, trip", RUNS)
def test_checkpoints_go_round_all_layouts(pool, one_process, tmp_path, family: str, trip: str) -> None:
    """Two steps on each layout, from the checkpoint of the one before, are eight steps on one process."""
    expected, first = layouts.whole_run(family), 1
    for world, layout in TRIPS[trip]:
        last = first + 1
        ranks = pool(world).run(train_on, family, layout, str(tmp_path), (first, last))
        for trace, _ in ranks:
            assert layouts._relative(trace.losses, expected.losses[first - 1 : last]) <= 1e-5
            assert layouts._relative(trace.grad_norms, expected.grad_norms[first - 1 : last]) <= 1e-4
            assert trace.iterations == expected.iterations[first - 1 : last]
        if layout.pipeline > 1:
            assert_copies_agree([rank[1] for rank in ranks])
        first = last + 1
    lm = load_pretrained(tmp_path)  # in a plain process, whatever saved it
    for key, value in gather_reference(lm.model).items():
        assert torch.equal(value, ranks[0][0].parameters[key]), key

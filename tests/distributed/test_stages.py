"""A model divided into pipeline stages: its parameters, its slices of F, and the copies that several stages hold."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.conversion.reference import gather_reference
from megatron_implicit.layers.leaf_weights import LeafWeights
from megatron_implicit.models.language import rotary_angles
from tests import goldens, traces

from megatron.core import parallel_state  # isort: skip

PP2 = traces.Layout(pipeline=2)
UNEVEN = traces.Layout(pipeline=2, layers_per_stage=[1, 2])
BOTH = traces.Layout(tensor=2, pipeline=2, sequence=True)


def initial_parameters(family: str, layout: traces.Layout) -> dict[str, Tensor]:
    """Whole tensors of a freshly initialised model."""
    config = layout.apply(traces.golden_training_config(family))
    return {key: value.clone() for key, value in gather_reference(traces.build(config)).items()}


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_initialisation_does_not_depend_on_the_stages(pool, one_process: None, family: str) -> None:
    expected = initial_parameters(family, traces.Layout())
    for parameters in pool(2).run(initial_parameters, family, UNEVEN):
        assert parameters.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(parameters[key], value), key


def first_pass(family: str, layout: traces.Layout) -> Tensor:
    """F(0; u) of the golden tokens, the stages taking turns; on the last one, which knows it."""
    config = layout.apply(goldens.golden_config(family))
    model = traces.build_golden(config, family)
    decoder, stage = model.decoder, model.decoder.stage
    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    tokens = torch.from_numpy(goldens.arrays(family)["input_ids"])
    x = torch.empty(tokens.shape[1] // (2 if layout.sequence else 1), tokens.shape[0], model.config.hidden_size)
    h = torch.zeros_like(x)
    with torch.no_grad():
        if stage.is_first:
            x = decoder.normed(model.embedding(tokens, None))
        else:
            for tensor in (x, h):
                dist.recv(tensor, ranks[stage.index - 1])
        bound_pass = decoder.begin_normed(x, weights=LeafWeights(decoder).bound)
        h = decoder.evaluate(h, bound_pass, rotary_angles(model, tokens.shape[1]))
        assert not h.requires_grad
        if not stage.is_last:
            for tensor in (x, h):
                dist.send(tensor, ranks[stage.index + 1])
    return h.transpose(0, 1)


@pytest.mark.parametrize("family", goldens.IMPLICIT)
@pytest.mark.parametrize("world, layout", [(2, PP2), (2, UNEVEN)], ids=["PP2", "PP2 uneven"])
def test_stages_together_evaluate_the_map(pool, family: str, world: int, layout: traces.Layout) -> None:
    last = pool(world).run(first_pass, family, layout)[-1]
    assert float((last - goldens.tensor(family, "dbg/f0")).abs().max()) <= 1e-5

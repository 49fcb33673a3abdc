"""Effective weights that microbatches share: the same gradients, one backward pass through the weight norm."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit.layers.leaf_weights import LeafWeights
from megatron_implicit.models.language import rotary_angles
from tests import goldens, traces

MICROBATCHES = 3


def gradients(family: str, *, shared: bool) -> dict[str, torch.Tensor]:
    """Of all parameters, after one pass of F for each microbatch."""
    model = traces.build_golden(goldens.golden_config(family), family).train()
    decoder, tokens = model.decoder, torch.from_numpy(goldens.arrays(family)["input_ids"])
    leaves = LeafWeights(decoder) if shared else None
    for microbatch in range(MICROBATCHES):
        embedding = model.embedding(tokens.roll(microbatch, 1), None)
        bound_pass = decoder.begin(embedding, weights=leaves.bound if shared else None)
        z = torch.zeros_like(embedding).detach()
        decoder.evaluate(z, bound_pass, rotary_angles(model, tokens.shape[1])).square().sum().backward()
    if shared:
        before = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert not any(name.endswith(("weight_v", "weight_g")) for name in before)
        leaves.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_shared_leaves_give_the_same_gradients(one_process: None, family: str) -> None:
    expected, values = gradients(family, shared=False), gradients(family, shared=True)
    assert values.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((values[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name


def test_gradients_are_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256."""
    owner = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    leaves = LeafWeights(owner)
    leaf = leaves._leaf(owner.weight * 1)
    for size in (256.0, 1.0, 1.0):
        (leaf * size).sum().backward()
    assert float(leaves._gradients[-1]) == 258.0

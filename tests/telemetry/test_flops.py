"""Model FLOPs against torch's own counter, both architectures, explicit and implicit with known evaluations."""

from __future__ import annotations

import math
from typing import Any, Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.models import build_model
from megatron_implicit.ops import ssd
from megatron_implicit.telemetry.flops import model_flops
from tests import goldens

BATCH, TOKENS, EVALUATIONS, PHANTOM = 2, 64, 3, 2


def _config(family: str):
    values = config_to_dict(goldens.golden_config(family))
    values["data"]["sequence_length"] = TOKENS
    values["train"]["tokens"] = None
    values["solver"] |= {"max_iterations": EVALUATIONS, "phantom_steps": PHANTOM, "tolerance": 0.0}
    if family.endswith("mamba2"):
        values["model"]["scan_chunk_size"] = 32
    return config_from_dict(values)


@pytest.mark.parametrize("family", ["implicit_llama", "explicit_llama", "implicit_mamba2", "explicit_mamba2"])
def test_flops_of_a_training_step_match_the_counter(
    family: str, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward. Our scan's own backward recomputes, which is no model FLOP: autograd's is counted."""
    monkeypatch.setattr(ssd._ChunkedScan, "apply", ssd._forward)
    config = _config(family)
    assert _counted(config) == pytest.approx(_formula(config), rel=0.01)


@pytest.mark.parametrize("family", ["implicit_mamba2", "explicit_llama"])
def test_flops_of_a_forward_pass_match_the_counter(family: str, one_process: None) -> None:
    config = _config(family)
    assert _counted(config, backward=False) == pytest.approx(_formula(config, backward=False), rel=0.01)


def test_one_evaluation_more_costs_one_pass_of_the_stack(one_process: None) -> None:
    config = _config("implicit_mamba2")
    fewer = _counted(config, backward=False)
    config.solver.max_iterations += 1
    assert _counted(config, backward=False) - fewer == pytest.approx(model_flops(config).stack, rel=0.01)


def _counted(config, *, backward: bool = True) -> float:
    start_model_parallel(config.parallel)
    model = build_model(config).train()
    ids = torch.randint(0, config.model.vocab_size, (BATCH, TOKENS))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward})
    # The counter does not know the CPU's fused attention.
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(ids, None, None, labels=ids).mean()
        if backward:
            loss.backward()
    return counter.get_total_flops() / (BATCH * TOKENS)


def _conv_backward(gradient: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """The gradients of a depthwise convolution, by input and weight; the counter's own formula ignores groups."""
    return 2 * 2 * math.prod(gradient) * weight[-1]


def _formula(config, *, backward: bool = True) -> float:
    flops = model_flops(config)
    evaluations, passes = (EVALUATIONS, PHANTOM) if config.implicit else (0, 1)
    if backward:
        return flops.training(evaluations, passes)
    return flops.stack * (evaluations + passes) + flops.injection + flops.head

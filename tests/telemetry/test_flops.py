"""Model FLOPs against torch's own counter, both architectures, explicit and implicit with known evaluations."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.models import build_model
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


@pytest.mark.parametrize("family", ["implicit_llama", "explicit_llama"])
def test_llama_flops_match_the_counter(family: str, one_process: None) -> None:
    """All products of a Llama are matrix products that the counter sees."""
    config = _config(family)
    assert _counted(config) == pytest.approx(_formula(config), rel=0.01)


@pytest.mark.parametrize("family", ["implicit_mamba2", "explicit_mamba2"])
def test_mamba2_flops_match_the_counter(family: str, one_process: None) -> None:
    """The scan keeps its own backward, which recomputes: only the forward passes are compared."""
    config = _config(family)
    assert _counted(config, backward=False) == pytest.approx(_formula(config, backward=False), rel=0.01)


def _counted(config, *, backward: bool = True) -> float:
    start_model_parallel(config.parallel)
    model = build_model(config).train()
    ids = torch.randint(0, config.model.vocab_size, (BATCH, TOKENS))
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(ids, None, None, labels=ids).mean()
        if backward:
            loss.backward()
    return counter.get_total_flops() / (BATCH * TOKENS)


def _formula(config, *, backward: bool = True) -> float:
    flops = model_flops(config)
    evaluations, passes = (EVALUATIONS, PHANTOM) if config.implicit else (0, 1)
    if backward:
        return flops.training(evaluations, passes)
    return flops.stack * (evaluations + passes) + flops.injection + flops.head

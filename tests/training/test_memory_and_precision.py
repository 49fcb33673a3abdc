"""What a step keeps in memory, and bf16 matrices under fp32 main parameters."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.training.benchmark import TrainStepBenchmark
from tests import goldens, traces


@pytest.mark.parametrize("family", goldens.IMPLICIT)
@pytest.mark.parametrize("recompute", ["none", "layer", "pass"])
def test_saved_bytes_do_not_depend_on_the_evaluations(family: str, recompute: str, one_process: None) -> None:
    config = traces.Layout(recompute=recompute).apply(goldens.golden_config(family))
    config.data.sequence_length = 32
    benchmark = TrainStepBenchmark(config, evaluations=4, phantom_steps=2)
    few, many = benchmark.saved_bytes(4), benchmark.saved_bytes(64)
    assert few == many > 0


def test_recomputation_keeps_less(one_process: None) -> None:
    sizes = {}
    for recompute in ("none", "layer", "pass"):
        config = traces.Layout(recompute=recompute).apply(goldens.golden_config("implicit_mamba2"))
        config.data.sequence_length = 32
        sizes[recompute] = TrainStepBenchmark(config, evaluations=4, phantom_steps=2).saved_bytes(4)
    assert sizes["pass"] < sizes["layer"] < sizes["none"]


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_bf16_training_follows_fp32(family: str, one_process: None) -> None:
    """Matrices in bf16, gains, norms and per-head parameters in fp32; losses within bf16's rounding."""
    values = config_to_dict(traces.golden_training_config(family))
    values["train"]["precision"] = "bf16"
    config = config_from_dict(values)
    parts = traces.prepare(config, goldens.state_dict(family))
    dtypes = {name.rsplit(".", 1)[1]: p.dtype for name, p in parts.model.module.named_parameters()}
    assert dtypes["weight_v"] == torch.bfloat16
    assert dtypes["weight_g"] == torch.float32
    main = {p.dtype for group in parts.optimizer.param_groups for p in group["params"]}
    assert main == {torch.float32}
    tokens = torch.from_numpy(goldens.arrays(f"{family}_training")["tokens"])
    bf16 = traces.train(config, parts, tokens)
    fp32 = traces.run_golden_training(family, traces.Layout())
    for loss, expected in zip(bf16.losses, fp32.losses, strict=True):
        assert loss == pytest.approx(expected, rel=0.02)
    assert bf16.losses != fp32.losses

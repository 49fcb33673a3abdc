"""What a step keeps in memory, and bf16 matrices under fp32 main parameters."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.models import build_model
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


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_the_residual_stream_stays_float32_under_bf16(family: str, one_process: None) -> None:
    """Branches compute in bf16; what they are added to, and what leaves every layer, is float32."""
    values = config_to_dict(traces.golden_training_config(family))
    values["train"]["precision"] = "bf16"
    model = build_model(config_from_dict(values)).train()
    streams, branches = [], []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, __, output: streams.append(_first(output).dtype))
        branch = layer.mixer if hasattr(layer, "mixer") else layer.self_attention
        branch.register_forward_hook(lambda _, __, output: branches.append(_first(output).dtype))
    model(torch.zeros(1, 8, dtype=torch.long), None, None)
    assert streams and set(streams) == {torch.float32}
    assert set(branches) == {torch.bfloat16}


def _first(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output

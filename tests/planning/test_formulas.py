"""The planner's formulas against models that were built and against what torch saved."""

from __future__ import annotations

import pytest

from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.models import build_model
from megatron_implicit.models.parameters import count_parameters
from megatron_implicit.planning.activations import element_bytes, pass_bytes, token_bytes
from megatron_implicit.planning.parameters import stage_parameters
from megatron_implicit.training.benchmark import TrainStepBenchmark
from tests import goldens, traces

SEQUENCE, BATCH = 32, 2


def _local_parameters(family: str, tensor: int, layers: tuple[int, ...]) -> tuple[int, int]:
    """(parameters, bytes) of this rank."""
    layout = traces.Layout(tensor, len(layers), list(layers))
    config = layout.apply(goldens.golden_config(family))
    config.train.precision = "bf16"
    start_model_parallel(config.parallel)
    counts = count_parameters(build_model(config, initialise=False)).values()
    return sum(count.local for count in counts), sum(count.local_bytes for count in counts)


def _predicted(family: str, tensor: int, layers: tuple[int, ...], stage: int = 0) -> tuple[int, int]:
    config = goldens.golden_config(family)
    config.train.precision = "bf16"
    parameters = stage_parameters(config, tensor, layers[stage], first=stage == 0, last=stage == len(layers) - 1)
    return parameters.total, parameters.stored_bytes(element_bytes(config))


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_parameters_are_those_of_the_built_model(family: str, one_process: None) -> None:
    layers = (goldens.golden_config(family).model.num_layers,)
    assert _predicted(family, 1, layers) == _local_parameters(family, 1, layers)


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_parameters_of_a_tensor_parallel_rank(family: str, pool) -> None:
    layers = (goldens.golden_config(family).model.num_layers,)
    assert _predicted(family, 2, layers) == pool(2).run(_local_parameters, family, 2, layers)[0]


@pytest.mark.parametrize("family", ["implicit_mamba2", "implicit_llama", "explicit_llama"])
def test_parameters_of_pipeline_stages(family: str, pool) -> None:
    layers = (1, goldens.golden_config(family).model.num_layers - 1)
    built = pool(2).run(_local_parameters, family, 1, layers)
    assert built == [_predicted(family, 1, layers, stage) for stage in range(2)]


@pytest.mark.parametrize("family", goldens.IMPLICIT)
@pytest.mark.parametrize(
    "precision, recompute", [("fp32", "none"), ("bf16", "none"), ("fp32", "layer"), ("fp32", "pass")]
)
def test_bytes_of_a_pass_are_those_torch_saves(family: str, precision: str, recompute: str, one_process: None) -> None:
    """What one more pass with gradient adds. The formulas leave out statistics and tables without a channel's width."""
    config = traces.Layout(recompute=recompute).apply(goldens.golden_config(family))
    config.data.sequence_length, config.train.micro_batch_size = SEQUENCE, BATCH
    config.train.precision, config.parallel.distributed_optimizer = precision, precision == "bf16"
    saved = {}
    for passes in (2, 3):
        benchmark = TrainStepBenchmark(config, evaluations=1, phantom_steps=passes)
        saved[passes] = benchmark.saved_bytes(1)
    kept = pass_bytes(token_bytes(config, 1, False), config.model.num_layers, recompute, last=True)
    assert BATCH * SEQUENCE * kept == pytest.approx(saved[3] - saved[2], rel=0.04)

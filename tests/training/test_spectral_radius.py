"""The spectral radius as a metric of training: the same at every layout, unnoticed by the run's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.errors import ConfigError
from megatron_implicit.solver import SolveSettings
from megatron_implicit.training.callbacks.spectral_radius import radii_at_fixed_points
from tests import goldens, traces
from tests.launch.conftest import Runs, runs, words  # noqa: F401  (fixtures)

TENSOR, SEQUENCE = traces.Layout(tensor=2), traces.Layout(tensor=2, sequence=True)


def golden_radii(family: str, layout: traces.Layout) -> Tensor:
    config = layout.apply(goldens.golden_config(family))
    model = traces.build_golden(config, family)
    tokens = torch.from_numpy(goldens.arrays(family)["input_ids"])
    generator = torch.get_rng_state()
    radii = radii_at_fixed_points(model, tokens, SolveSettings.inference(config.inference), iterations=8)
    assert torch.equal(torch.get_rng_state(), generator)  # training goes on as if nothing had been measured
    assert all(parameter.grad is None for parameter in model.parameters())
    return radii


@pytest.mark.parametrize("family", ["implicit_mamba2", "implicit_llama"])
def test_the_estimate_does_not_depend_on_the_layout(pool, one_process: None, family: str) -> None:
    expected = golden_radii(family, traces.Layout())
    assert (expected > 0).all()
    for radii in pool(2).run(golden_radii, family, TENSOR):
        torch.testing.assert_close(radii, expected, rtol=1e-3, atol=0)


def test_a_sequence_over_two_ranks_gives_one_number(pool) -> None:
    first, second = pool(2).run(golden_radii, "implicit_mamba2", SEQUENCE)
    assert torch.equal(first, second) and (first > 0).all()


def test_a_run_writes_it(runs: Runs) -> None:  # noqa: F811
    job = runs.start("radius", "--train.steps=4", "--telemetry.spectral_radius_every=2")
    assert job.code == 0, job.output
    found = {step: row.get("spectral_radius") for step, row in runs.metrics("radius").items()}
    assert found[1] is None and found[3] is None and 0 < found[2] < 10 and 0 < found[4] < 10


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("parallel", {"pipeline": 2}, "needs all of F on a rank: a pipeline stage has a part of it"),
        ("model", {"family": "explicit_mamba2"}, "needs an implicit model: explicit_mamba2 has no fixed point"),
        ("telemetry", {"spectral_radius_every": -1}, "must not be negative"),
    ],
)
def test_where_there_is_none_it_is_refused(section: str, values: dict, message: str) -> None:
    config = config_to_dict(goldens.golden_config("implicit_mamba2"))
    config["telemetry"]["spectral_radius_every"] = 5
    config["parallel"]["layers_per_stage"] = None
    config[section] |= values
    with pytest.raises(ConfigError, match=message):
        config_from_dict(config)

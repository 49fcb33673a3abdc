"""The golden 30-step training traces on one process: clipping, schedule and phase switch included."""

from __future__ import annotations

import pytest

from tests import traces


@pytest.mark.parametrize(
    "family, recompute",
    [("implicit_mamba2", "none"), ("implicit_llama", "none"), ("implicit_mamba2", "layer"), ("implicit_llama", "pass")],
)
def test_training_matches_the_reference(family: str, recompute: str, one_process: None) -> None:
    trace = traces.run_golden_training(family, traces.Layout(recompute=recompute))
    traces.check_golden_training(trace, family)

"""Golden parity on one process: all models, all cases, every gradient, identical counts."""

from __future__ import annotations

import numpy as np
import pytest

from tests import goldens

TRAINING_CASES = [(family, case) for family in goldens.IMPLICIT for case in ("train", "bounded", "pretrain", "nonconv")]
TRAINING_CASES += [(family, "train") for family in goldens.FAMILIES[2:]]


def check_training_case(result: goldens.CaseResult, family: str, case: str) -> None:
    """The tolerances of golden/README.md."""
    logits = {"nonconv": 1e-3 if "llama" in family else 1e-4}.get(case, 1e-5)
    gradients = {"nonconv": 1e-3 if "llama" in family else 1e-4}.get(case, 5e-5)
    assert result.logits <= logits
    assert result.loss <= logits
    worst = max(result.gradients, key=result.gradients.get)
    assert result.gradients[worst] <= gradients, worst
    assert result.gradient_norm <= gradients
    if result.iterations:
        assert result.iterations == goldens.tensor(family, f"{case}/nstep_per_sample").int().tolist()
        assert result.evaluations == int(goldens.tensor(family, f"{case}/n_solver_iters"))
        assert result.residuals <= logits


def check_inference_case(result: dict, family: str, case: str) -> None:
    """The tolerances of golden/README.md, counts included."""
    assert result["logits"] <= 1e-5
    if not family.startswith("implicit"):
        return
    batch = goldens.arrays(family)["input_ids"].shape[0]
    if case == "eval":
        steps = int(goldens.tensor(family, "eval/steps"))
        assert result["iterations"] == result["evaluations"] == [steps] * batch
    else:
        steps = goldens.tensor(family, "seq/steps_per_token").int().tolist()
        assert result["iterations"] == result["evaluations"] == [steps] * batch
    expected = goldens.arrays(f"{family}_out")[f"{case}/rel_trace"]
    ours = np.nan_to_num(result["residuals"][0].numpy())
    np.testing.assert_allclose(ours, np.nan_to_num(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family, case", TRAINING_CASES)
def test_training_forward_and_backward_match_the_reference(family: str, case: str, one_process: None) -> None:
    check_training_case(goldens.run_training_case(family, case), family, case)


@pytest.mark.parametrize("family", goldens.FAMILIES)
@pytest.mark.parametrize("case", ["eval", "seq"])
def test_inference_matches_the_reference(family: str, case: str, one_process: None) -> None:
    check_inference_case(goldens.run_inference_case(family, case), family, case)

"""Golden parity at tensor size 2, with and without sequence parallelism; the one-group Mamba2 included."""

from __future__ import annotations

import dataclasses

import pytest

from tests import goldens, traces
from tests.models.test_golden import TRAINING_CASES, check_inference_case, check_training_case
from tests.traces import check_golden_training


def training_cases(family: str, sequence: bool) -> dict[str, goldens.CaseResult]:
    """All training cases of a family on this rank."""
    cases = [case for name, case in TRAINING_CASES if name == family]
    return {case: goldens.run_training_case(family, case, tensor_size=2, sequence=sequence) for case in cases}


@pytest.mark.parametrize("family", goldens.FAMILIES)
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_training_cases_match_the_reference(pool, family: str, sequence: bool) -> None:
    first, second = pool(2).run(training_cases, family, sequence)
    for case, result in first.items():
        check_training_case(result, family, case)
        assert (result.iterations, result.evaluations) == (second[case].iterations, second[case].evaluations)


def inference_cases(family: str) -> dict[str, dict]:
    """Both inference cases of a family on this rank."""
    return {case: goldens.run_inference_case(family, case, tensor_size=2) for case in ("eval", "seq")}


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_inference_cases_match_the_reference(pool, family: str) -> None:
    for results in pool(2).run(inference_cases, family):
        for case, result in results.items():
            check_inference_case(result, family, case)


@pytest.mark.parametrize("family", goldens.IMPLICIT)
@pytest.mark.parametrize(
    "layout", [traces.Layout(tensor=2), traces.Layout(tensor=2, sequence=True)], ids=["tensor", "sequence"]
)
def test_training_traces_match_the_reference(pool, family: str, layout: traces.Layout) -> None:
    first, second = pool(2).run(traces.run_golden_training, family, layout)
    check_golden_training(first, family)
    assert first.iterations == second.iterations
    assert first.evaluations == second.evaluations


@pytest.mark.acceptance
def test_recomputation_under_sequence_parallelism_matches_the_reference(pool) -> None:
    layout = dataclasses.replace(traces.Layout(tensor=2, sequence=True), recompute="layer")
    check_golden_training(pool(2).run(traces.run_golden_training, "implicit_mamba2", layout)[0], "implicit_mamba2")


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_four_tensor_ranks_match_the_reference(pool, sequence: bool) -> None:
    for family in goldens.IMPLICIT:
        for result in pool(4).run(goldens.run_training_case, family, "train", tensor_size=4, sequence=sequence):
            check_training_case(result, family, "train")

"""The exact gradient of a fixed point's loss is that of a long unrolled solve, and phantom steps approach it."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit.evaluation.implicit_gradient import GradientProblem, exact_gradient, phantom_gradients, unsolved
from megatron_implicit.evaluation.studies.phantom_gradient import SIZES, measure
from tests.evaluation.opened import opened_model
from tests.inference.models import random_ids

pytestmark = pytest.mark.usefixtures("one_process")

ROWS = random_ids(2, 9, seed=2)


@pytest.mark.parametrize("kind", ["implicit_mamba2", "implicit_llama"])
def test_the_exact_gradient_is_that_of_a_long_unrolled_solve(kind: str) -> None:
    problem = GradientProblem(opened_model(kind), ROWS)
    exact = exact_gradient(problem, problem.solve())
    z, bound_pass = torch.zeros(8, 2, 32, dtype=torch.float64), problem.bind()
    for _ in range(150):
        z = 0.5 * problem.evaluate(z, bound_pass) + 0.5 * z
    unrolled = problem.gradient(problem.loss(z))
    assert exact.norm() > 1e-3
    assert (exact - unrolled).norm() < 1e-8 * exact.norm()


@pytest.mark.parametrize("kind", ["implicit_mamba2", "implicit_llama"])
def test_phantom_steps_approach_the_exact_gradient(kind: str) -> None:
    problem = GradientProblem(opened_model(kind), ROWS)
    solved = problem.solve()
    exact = exact_gradient(problem, solved)
    gradients = phantom_gradients(problem, solved, (1, 4, 60), damping=0.8)
    errors = [float((g - exact).norm() / exact.norm()) for g in gradients.values()]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_the_study_measures_cosines_that_rise_with_the_steps() -> None:
    problem = GradientProblem(opened_model("implicit_llama"), ROWS)
    found = measure(problem, SIZES["tiny"])
    for start in ("fixed point", "bounded"):
        for values in found[start].values():
            cosines = values["cosine"]
            assert cosines == sorted(cosines) and 0.5 < cosines[0] < cosines[-1] <= 1
    assert found["fixed point"]["1"]["cosine"][-1] > 0.999


def test_an_unsolved_iterate_is_that_of_so_many_undamped_evaluations() -> None:
    problem = GradientProblem(opened_model("implicit_mamba2"), ROWS)
    z, bound_pass = torch.zeros(8, 2, 32, dtype=torch.float64), problem.bind()
    assert torch.equal(unsolved(problem, 2), problem.evaluate(problem.evaluate(z, bound_pass), bound_pass).detach())

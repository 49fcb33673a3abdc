"""The solve as a state machine, on maps whose fixed points are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import pytest
import torch
from torch import Tensor

from megatron_implicit.config import InferenceConfig, SolverConfig
from megatron_implicit.errors import ConfigError, NonFiniteIterateError
from megatron_implicit.solver import FixedPointSolve, SolveSettings, Step, drive
from megatron_implicit.solver.settings import override

TRAINING = SolveSettings.training(SolverConfig(max_iterations=50, tolerance=1e-4, phantom_steps=2))
INFERENCE = SolveSettings.inference(InferenceConfig(max_iterations=100, tolerance=1e-4, damping=0.8))
SHAPE = (5, 3, 4)  # s, b, h


def affine(rates: list[float]) -> Callable[[Tensor, Step], Tensor]:
    """F(z) = rate_b z + 1 by sample: the fixed point is 1 / (1 - rate_b)."""
    rate = torch.tensor(rates)[None, :, None]
    return lambda z, step: rate * z + 1.0


def solve(settings: SolveSettings, function: Callable[[Tensor, Step], Tensor], shape: tuple[int, ...] = SHAPE):
    machine = FixedPointSolve(settings, torch.zeros(shape))
    return drive(machine, function), machine.trace()


def test_finds_the_fixed_point_and_counts_evaluations() -> None:
    z, trace = solve(TRAINING, affine([0.5, 0.1, -0.3]))
    expected = torch.tensor([2.0, 1 / 0.9, 1 / 1.3])[None, :, None].expand(SHAPE)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-3)
    # ||F(z) - z|| / ||F(z)|| of the slowest sample is 0.5^(k-1) / (2 - 0.5^(k-1)): below 1e-4 first at k = 14.
    assert trace.evaluations.tolist() == [14, 14, 14]
    assert trace.converged.all()
    assert trace.residuals.shape == (3, 14)
    assert trace.token_residuals.shape == (5, 3)


def test_fixed_counts_run_exactly_as_many_evaluations() -> None:
    calls = []
    settings = replace(TRAINING, tolerance=0.0, max_iterations=4, phantom_steps=1)
    _, trace = solve(settings, lambda z, step: calls.append(step) or affine([0.5] * 3)(z, step))
    assert calls == [Step.SOLVE] * 4 + [Step.PHANTOM]
    assert trace.evaluations.tolist() == [4, 4, 4]
    assert not trace.converged.any()


def test_goes_on_from_each_samples_best_iterate_and_not_the_last() -> None:
    """Sample 0 converges; sample 1 comes close and then runs away."""
    visits = iter(range(100))

    def function(z: Tensor, step: Step) -> Tensor:
        if step is Step.PHANTOM:
            return z
        k = next(visits)
        far = [1.0, 2.0, 2.1, 9.0, 50.0, 400.0][k]
        return torch.stack((torch.full((5, 4), 1.0 + 0.1**k), torch.full((5, 4), far)), dim=1)

    z, trace = solve(replace(TRAINING, max_iterations=6, tolerance=1e-9), function, (5, 2, 4))
    assert trace.iterations.tolist() == [6, 3]
    torch.testing.assert_close(z[:, 1], torch.full((5, 4), 2.1))
    assert trace.accepted_residuals[1] == pytest.approx(0.1 / 2.1, rel=1e-5)


@pytest.mark.parametrize("settings", [replace(TRAINING, stop="sample"), INFERENCE], ids=["training", "inference"])
def test_with_sample_stop_no_sample_depends_on_its_companions(settings: SolveSettings) -> None:
    rates = [0.9, 0.1, -0.5]
    together, trace = solve(settings, affine(rates))
    for index, rate in enumerate(rates):
        alone, own = solve(settings, affine([rate]), (5, 1, 4))
        assert torch.equal(together[:, index], alone[:, 0])
        assert trace.evaluations[index] == own.evaluations[0]
        assert trace.iterations[index] == own.iterations[0]
        assert torch.isnan(trace.residuals[index, own.evaluations[0] :]).all()


def test_with_batch_stop_all_samples_go_on_together() -> None:
    _, trace = solve(TRAINING, affine([0.9, 0.1, -0.5]))
    assert len(set(trace.evaluations.tolist())) == 1


def test_batch_norm_gives_every_sample_the_same_residual() -> None:
    _, trace = solve(replace(INFERENCE, norm="batch", stop="batch"), affine([0.9, 0.1, -0.5]))
    assert torch.equal(trace.residuals[0], trace.residuals[1])
    assert torch.equal(trace.residuals[0], trace.residuals[2])


def test_falls_back_to_the_smaller_damping_in_a_limit_cycle() -> None:
    """F(z) = 1 - z jumps between 0 and 1 for ever; half steps reach 1/2 at once. The other sample is left alone."""
    _, stuck = solve(TRAINING, affine([-1.0, 0.5, 0.5]))
    assert stuck.converged.tolist() == [False, True, True]
    z, trace = solve(replace(TRAINING, fallback_damping=0.5), affine([-1.0, 0.5, 0.5]))
    assert trace.converged.all()
    torch.testing.assert_close(z[:, 0], torch.full((5, 4), 0.5))
    assert trace.evaluations[0] < 20


def test_a_sample_that_has_fallen_back_stays_there() -> None:
    """F(z) = 1 - 0.999 z: undamped it creeps, and damped steps only help if they follow one another."""
    settings = replace(TRAINING, tolerance=1e-3, max_iterations=60, fallback_damping=0.8)
    _, trace = solve(settings, affine([-0.999, 0.5, 0.5]))
    assert trace.converged.all()
    assert trace.evaluations[0] < 30


def test_convergence_is_that_of_the_accepted_iterate() -> None:
    """The best residual counts, not the last: sample 1 is left by its companion's further evaluations."""
    visits = iter(range(100))

    def function(z: Tensor, step: Step) -> Tensor:
        k = next(visits)
        restless = [1.0, 1.0, 3.0, 7.0][k] if k < 4 else 7.0
        return torch.stack((torch.full((5, 4), 2.0**k), torch.full((5, 4), restless)), dim=1)

    _, trace = solve(replace(TRAINING, max_iterations=4), function, (5, 2, 4))
    assert trace.converged.tolist() == [False, True]


def test_solver_damping_and_phantom_damping_are_separate() -> None:
    iterates = []
    settings = replace(TRAINING, tolerance=0.0, max_iterations=2, damping=0.5, phantom_damping=0.25, phantom_steps=1)

    def function(z: Tensor, step: Step) -> Tensor:
        iterates.append((step, float(z.mean())))
        return torch.ones_like(z) if step is Step.SOLVE else 3 * torch.ones_like(z)

    z, _ = solve(settings, function)
    assert [value for step, value in iterates if step is Step.SOLVE] == [0.0, 0.5]
    assert iterates[-1] == (Step.PHANTOM, 1.0)  # the best image, undamped
    assert float(z.mean()) == pytest.approx(0.25 * 3 + 0.75 * 1.0)


def test_gradient_reaches_only_the_phantom_steps() -> None:
    """At the fixed point of F(z) = a z + 1, k damped steps give dz/da = z sum of tau (1 - tau + tau a)^j."""
    a, tau, steps = torch.tensor(0.5, requires_grad=True), 0.8, 3
    settings = replace(TRAINING, tolerance=1e-7, max_iterations=200, phantom_steps=steps, phantom_damping=tau)
    z, _ = solve(settings, lambda z, step: a * z + 1.0)
    z[0, 0, 0].backward()
    expected = sum(tau * 2.0 * (1 - tau + tau * 0.5) ** j for j in range(steps))
    assert float(a.grad) == pytest.approx(expected, rel=1e-5)


def test_solve_records_no_graph() -> None:
    a = torch.tensor(0.5, requires_grad=True)
    seen = []

    def function(z: Tensor, step: Step) -> Tensor:
        image = a * z + 1.0
        seen.append((step, image.requires_grad))
        return image

    solve(TRAINING, function)
    assert {wanted for step, wanted in seen if step is Step.SOLVE} == {False}
    assert {wanted for step, wanted in seen if step is Step.PHANTOM} == {True}


def test_unrolled_iteration_starts_undamped_and_carries_gradient_through_all_passes() -> None:
    a = torch.tensor(0.5, requires_grad=True)
    settings = replace(TRAINING, gradient="unrolled", max_iterations=3, phantom_damping=0.8)
    z, trace = solve(settings, lambda z, step: a * z + 1.0)
    b = torch.tensor(0.5, requires_grad=True)
    expected = torch.tensor(1.0)
    for _ in range(2):
        expected = 0.8 * (b * expected + 1.0) + 0.2 * expected
    torch.testing.assert_close(z, expected.expand(SHAPE))
    z[0, 0, 0].backward()
    expected.backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert trace.evaluations.tolist() == [3, 3, 3]


def test_inference_ends_with_one_undamped_output_pass() -> None:
    steps = []
    z, trace = solve(INFERENCE, lambda z, step: steps.append(step) or affine([0.5] * 3)(z, step))
    assert steps == [Step.SOLVE] * int(trace.evaluations[0]) + [Step.OUTPUT]
    assert trace.iterations.tolist() == trace.evaluations.tolist()


def test_inference_counts_its_output_pass_in_the_limit() -> None:
    settings = SolveSettings.inference(InferenceConfig(max_iterations=6, tolerance=0.0, damping=0.8))
    calls = []
    solve(settings, lambda z, step: calls.append(step) or affine([0.99] * 3)(z, step))
    assert calls == [Step.SOLVE] * 5 + [Step.OUTPUT]


@pytest.mark.parametrize("tolerance", [1e-4, 0.0], ids=["data-dependent", "fixed count"])
def test_an_iterate_that_is_not_finite_is_named(tolerance: float) -> None:
    visits = iter(range(1, 100))

    def function(z: Tensor, step: Step) -> Tensor:
        image = torch.ones_like(z) * next(visits)
        if image[0, 0, 0] == 3:
            image[2, 1] = float("inf")
        return image

    with pytest.raises(NonFiniteIterateError, match="evaluation 3: the fixed-point iterate of sample 1") as caught:
        solve(replace(TRAINING, accept="last", tolerance=tolerance, max_iterations=6), function)
    assert "step 7, microbatch 2, evaluation 3" in str(caught.value.at(7, 2))


def test_a_training_solve_whose_iterate_is_not_finite_goes_on_to_its_passes_with_gradient() -> None:
    steps = []

    def function(z: Tensor, step: Step) -> Tensor:
        steps.append(step)
        image = torch.ones_like(z)
        if len(steps) == 3:
            image[2, 1] = float("inf")
        return image

    z, trace = solve(replace(TRAINING, tolerance=1e-9, max_iterations=6, damping=0.5), function)
    assert steps == [Step.SOLVE] * 3 + [Step.PHANTOM] * TRAINING.phantom_steps and z.isfinite().all()
    assert trace.broken_at.tolist() == [0, 3, 0]


def test_a_pass_with_gradient_that_is_not_finite_is_in_the_trace() -> None:
    def function(z: Tensor, step: Step) -> Tensor:
        image = torch.ones_like(z)
        if step is Step.PHANTOM:
            image[0, 2, 0] = float("nan")
        return image

    _, trace = solve(replace(TRAINING, tolerance=0.0, max_iterations=4), function)
    assert trace.broken_at.tolist() == [0, 0, 5]


def test_token_quantiles_tell_the_restless_token() -> None:
    def function(z: Tensor, step: Step) -> Tensor:
        image = torch.ones_like(z)
        image[3, 0] = 1.0 - z[3, 0]
        return image

    _, trace = solve(replace(TRAINING, max_iterations=8), function)
    quantiles = trace.token_quantiles()
    assert quantiles["p50"] == 0.0
    assert quantiles["p100"] > 1e3


def test_residuals_are_reduced_before_any_decision() -> None:
    """Two shards of the sequence, solved apart with summed squares, do what one whole solve does."""
    whole, trace = solve(TRAINING, affine([0.5, 0.1, -0.3]))
    doubled = FixedPointSolve(TRAINING, torch.zeros(SHAPE), lambda sums: sums.mul_(2))
    shard = drive(doubled, affine([0.5, 0.1, -0.3]))
    assert torch.equal(shard, whole)
    torch.testing.assert_close(doubled.trace().residuals, trace.residuals)


def test_an_unknown_override_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="solver override 'max_iter' is unknown: use one of max_iterations"):
        override(SolverConfig(), {"max_iter": 3})


def test_padding_is_kept_out_of_residuals() -> None:
    """Sample 1 has 2 of 5 tokens and sample 2 none; the others jump about for ever."""
    counting = torch.arange(5)[:, None] < torch.tensor([5, 2, 0])

    def function(z: Tensor, step: Step) -> Tensor:
        image = affine([0.5, 0.1, -0.3])(z, step)
        image[2:, 1] = 1.0 - z[2:, 1]
        image[:, 2] = 1.0 - z[:, 2]
        return image

    machine = FixedPointSolve(INFERENCE, torch.zeros(SHAPE), counting=counting)
    z = drive(machine, function)
    trace = machine.trace()
    assert trace.converged.all()
    assert trace.evaluations[2] == trace.iterations[2] == 0
    torch.testing.assert_close(z[:2, 1], torch.full((2, 4), 1 / 0.9), atol=1e-3, rtol=1e-3)


def test_under_the_token_norm_every_token_reaches_the_tolerance() -> None:
    rates, sources = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.9], [1.0, 1.0, 1.0, 1.0, 0.01]])[:, :, None, None]
    residuals = {}
    for norm in ("sample", "token"):
        settings = replace(INFERENCE, norm=norm, tolerance=1e-2)
        _, trace = solve(settings, lambda z, step: rates * z + sources, (5, 1, 4))
        residuals[norm] = float(trace.token_residuals.max())
        assert trace.converged.all()
    assert residuals["token"] < 1e-2 < residuals["sample"]

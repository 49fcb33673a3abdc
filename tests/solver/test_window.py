"""The window solve, on recurrences whose fixed points are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import pytest
import torch
from torch import Tensor

from megatron_implicit.config import InferenceConfig
from megatron_implicit.errors import NonFiniteIterateError
from megatron_implicit.solver import FixedPointSolve, SolveSettings, SolveTrace, Step, WindowSolve, drive

SETTINGS = SolveSettings.inference(InferenceConfig(max_iterations=200, tolerance=1e-6, damping=1.0))
WIDTH = 4
Update = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z of the tokens before [w, b, h], z [w, b, h], places [w, b]) -> F(z)."""


def front(before: Tensor, z: Tensor, places: Tensor) -> Tensor:
    """Each token is a function of the one before it alone: what is known moves one token an evaluation."""
    return torch.cos(2.0 * before + places[:, :, None])


class Recurrence:
    """A model whose state is the last committed z, solved in a window."""

    def __init__(self, update: Update, lengths: list[int], window: int, settings: SolveSettings = SETTINGS) -> None:
        self.update = update
        self.solve = WindowSolve(settings, window, lengths, WIDTH, torch.device("cpu"))
        self.committed = torch.zeros(1, len(lengths), WIDTH)
        self.hidden = torch.zeros(max(lengths), len(lengths), WIDTH)
        self.steps: list[Step] = []

    def run(self) -> tuple[Tensor, SolveTrace]:
        drive(self.solve, self.evaluate)
        return self.hidden, self.solve.trace()

    def evaluate(self, z: Tensor, step: Step) -> Tensor:
        self.steps.append(step)
        image = self.update(torch.cat((self.committed, z[:-1])), z, self.solve.places()[: len(z)])
        if step is Step.OUTPUT:
            for sample, count in enumerate(self.solve.accepted):
                begin = int(self.solve.fronts[sample])
                self.hidden[begin : begin + count, sample] = image[:count, sample]
                if count:
                    self.committed[0, sample] = image[count - 1, sample]
        return image


def simultaneous(update: Update, length: int, settings: SolveSettings = SETTINGS) -> tuple[Tensor, SolveTrace]:
    places = torch.arange(length)[:, None]
    solve = FixedPointSolve(settings, torch.zeros(length, 1, WIDTH))
    z = drive(solve, lambda z, step: update(torch.cat((torch.zeros(1, 1, WIDTH), z[:-1])), z, places))
    return z, solve.trace()


@pytest.mark.parametrize("window", [1, 2, 4, 40])
def test_finds_what_the_whole_sequence_solve_finds(window: int) -> None:
    z, trace = Recurrence(front, [40], window).run()
    torch.testing.assert_close(z, simultaneous(front, 40)[0], atol=1e-5, rtol=1e-5)
    assert trace.converged.all()
    assert trace.evaluations.shape == (1, 40)


def test_spends_evaluations_only_near_the_front() -> None:
    _, whole = simultaneous(front, 64)
    _, windowed = Recurrence(front, [64], 4).run()
    assert int(whole.evaluations[0]) >= 64  # of every token
    assert float(windowed.evaluations.float().mean()) < 8


def test_every_residual_of_a_token_is_in_the_trace() -> None:
    _, trace = Recurrence(front, [12], 3).run()
    seen = (~torch.isnan(trace.residuals)).sum(-1)
    assert torch.equal(seen, trace.evaluations)
    assert torch.equal(trace.iterations, trace.evaluations)
    assert (trace.accepted_residuals < SETTINGS.tolerance).all()


def restless(before: Tensor, z: Tensor, places: Tensor) -> Tensor:
    """Token 2 jumps between two values for ever; the others settle at once."""
    return torch.where(places[:, :, None] == 2, 1.0 - z, torch.ones_like(z))


@pytest.mark.parametrize("limits, at_most", [(dict(patience=5), 12), (dict(patience=10**6, max_iterations=30), 40)])
def test_a_restless_token_cannot_stall_the_window(limits: dict, at_most: int) -> None:
    run = Recurrence(restless, [8], 4, replace(SETTINGS, **limits))
    _, trace = run.run()
    assert trace.converged[0].tolist() == [place != 2 for place in range(8)]
    assert run.steps.count(Step.SOLVE) <= at_most
    assert torch.equal(run.hidden[3:], torch.ones(5, 1, WIDTH))


def test_a_slow_token_is_not_a_restless_one() -> None:
    """Residuals fall by 5% an evaluation, which is progress within 8 evaluations."""
    _, trace = Recurrence(lambda before, z, places: 0.95 * z + 0.05, [3], 2, replace(SETTINGS, max_iterations=500)).run()
    assert trace.converged.all()
    assert int(trace.evaluations.max()) > 100


def test_no_sample_depends_on_its_companions() -> None:
    """Different lengths and speeds: fronts move apart."""

    def update(before: Tensor, z: Tensor, places: Tensor) -> Tensor:
        speeds = torch.tensor([0.1, 0.8, 0.5])[: z.shape[1]][None, :, None]
        return speeds * torch.sin(z + before) + places[:, :, None] / 10

    lengths = [9, 5, 14]
    z, trace = Recurrence(update, lengths, 4).run()
    for sample, length in enumerate(lengths):

        def own(before: Tensor, z: Tensor, places: Tensor) -> Tensor:
            blank = (z.shape[0], 3, WIDTH)
            return update(before.expand(blank), z.expand(blank), places.expand(blank[:2]))[:, sample : sample + 1]

        alone, own_trace = Recurrence(own, [length], 4).run()
        assert torch.equal(z[:length, sample], alone[:, 0])
        assert torch.equal(trace.evaluations[sample, :length], own_trace.evaluations[0])
        assert torch.equal(trace.evaluations[sample, length:], torch.zeros(14 - length, dtype=torch.long))
        assert trace.converged[sample].all()


def test_a_warm_start_begins_at_the_token_before() -> None:
    seen = []

    def update(before: Tensor, z: Tensor, places: Tensor) -> Tensor:
        seen.append((z[:, 0, 0].clone(), places[:, 0]))
        return torch.full_like(z, 7.0)

    Recurrence(update, [6], 2, replace(SETTINGS, warm_start=True)).run()
    entered = [float(z[1]) for z, places in seen if len(z) == 2 and places[1] > 1]
    assert entered and set(entered) == {7.0}


def test_an_iterate_that_is_not_finite_names_its_sample() -> None:
    def update(before: Tensor, z: Tensor, places: Tensor) -> Tensor:
        image = torch.ones_like(z)
        image[:, 1] = float("nan")
        return image

    with pytest.raises(NonFiniteIterateError, match="iterate of sample 1 is not finite"):
        Recurrence(update, [4, 4], 2).run()

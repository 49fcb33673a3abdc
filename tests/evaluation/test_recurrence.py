"""The Jacobian token to token: closed form against autograd, and what of it is diagonal."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit.errors import ConfigError, DivergedError
from megatron_implicit.evaluation.open_model import expand, jacobian, off_diagonal_mass
from megatron_implicit.evaluation.recurrence import (
    OutputRecurrence,
    StateRecurrence,
    TokenRecurrence,
    relative_difference,
)
from tests.evaluation.opened import opened_model
from tests.inference.models import random_ids, small_model, tight

pytestmark = pytest.mark.usefixtures("one_process")

IDS = random_ids(1, 9, seed=5)


@pytest.mark.parametrize("kind", ["implicit_mamba2", "implicit_llama"])
def test_outputs_closed_form_is_what_autograd_gives(kind: str) -> None:
    recurrence = OutputRecurrence(opened_model(kind), IDS, 6)
    closed = recurrence.closed_form()
    assert closed.norm() > 1e-3
    assert relative_difference(recurrence.by_autograd(), closed) < 1e-9


@pytest.mark.parametrize("layers", [1, 2])
def test_states_closed_form_is_what_autograd_gives(layers: int) -> None:
    recurrence = StateRecurrence(TokenRecurrence(opened_model("implicit_mamba2"), IDS, 6), layers)
    rows = list(range(3, sum(recurrence.sizes), 97))
    closed = recurrence.closed_form(rows)
    assert relative_difference(recurrence.by_autograd(rows), closed) < 1e-9
    assert off_diagonal_mass(closed, rows) > 1e-3


def test_outputs_closed_form_is_what_differences_give() -> None:
    opened = opened_model("implicit_mamba2")
    closed = OutputRecurrence(opened, IDS, 6).closed_form()
    before, token, step = opened.states_after(IDS[:, :5]), IDS[:, 6:7], 1e-5
    z, _ = opened.solve(IDS[:, 5:6], 5, before)

    def next_output(z: torch.Tensor) -> torch.Tensor:
        return opened.solve(token, 6, opened.evaluate(z, IDS[:, 5:6], 5, before)[1])[0][0, 0]

    with torch.no_grad():
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
        difference = (next_output(z + step * direction) - next_output(z - step * direction)) / (2 * step)
    torch.testing.assert_close(closed @ direction[0, 0], difference, rtol=1e-5, atol=1e-8)


def test_an_explicit_layers_own_recurrence_is_diagonal() -> None:
    recurrence = StateRecurrence(TokenRecurrence(opened_model("explicit_mamba2"), IDS, 6), 2)
    first = recurrence.sizes[0]
    closed = recurrence.closed_form(range(sum(recurrence.sizes)))
    assert off_diagonal_mass(closed[:first, :first]) == 0 == off_diagonal_mass(closed[first:, first:])
    assert closed[:first, first:].abs().max() == 0  # a layer does not read those above it
    assert closed[first:, :first].abs().max() > 0


def test_attention_has_no_recurrence_of_states() -> None:
    token = TokenRecurrence(opened_model("implicit_llama"), IDS, 4)
    with pytest.raises(ConfigError, match="look at the recurrence of outputs"):
        StateRecurrence(token, 1)


@pytest.mark.parametrize("kind", ["implicit_mamba2", "implicit_llama_grouped"])
def test_an_opened_model_computes_what_the_model_does(kind: str) -> None:
    expected = small_model(kind, 2)(IDS, residual_norm="token", **tight(kind)).hidden
    opened = opened_model(kind)
    whole, _ = opened.solve(IDS)
    torch.testing.assert_close(whole.transpose(0, 1).float(), expected, rtol=1e-4, atol=1e-5)
    last, _ = opened.solve(IDS[:, 8:], 8, opened.states_after(IDS[:, :8]))
    torch.testing.assert_close(last[0], whole[8], rtol=1e-10, atol=1e-10)


def test_a_solve_that_does_not_converge_says_so() -> None:
    with pytest.raises(DivergedError, match="residual of .* after 3 evaluations, not below 1e-13"):
        opened_model("implicit_mamba2").solve(IDS, limit=3)


def test_jacobian_of_a_known_function() -> None:
    matrix = torch.randn(5, 3, dtype=torch.float64)
    point = torch.randn(3, dtype=torch.float64)
    expected = matrix * torch.cos(matrix @ point)[:, None]
    torch.testing.assert_close(jacobian(lambda x: torch.sin(x @ matrix.T), point, copies=2), expected)
    torch.testing.assert_close(jacobian(lambda x: torch.sin(x @ matrix.T), point, [4, 1]), expected[[4, 1]])


def test_off_diagonal_mass() -> None:
    matrix = torch.tensor([[3.0, -1.0], [0.0, 4.0]])
    assert off_diagonal_mass(matrix) == pytest.approx(1 / 8)
    assert off_diagonal_mass(matrix[1:], [1]) == 0
    assert expand({}, 3) == {}

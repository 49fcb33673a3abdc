"""Power iteration against eigenvalues of Jacobians that are written out."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit.evaluation.open_model import jacobian
from megatron_implicit.solver.spectrum import spectral_radius
from tests.evaluation.opened import opened_model
from tests.inference.models import random_ids

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("kind", ["implicit_mamba2", "implicit_llama"])
def test_of_a_model_it_is_the_largest_eigenvalue(kind: str) -> None:
    opened, ids = opened_model(kind), random_ids(2, 5, seed=3)
    z, _ = opened.solve(ids)
    estimate = spectral_radius(lambda z: opened.evaluate(z, ids)[0], z, iterations=400)
    for sample in range(2):
        own = ids[sample : sample + 1]

        def whole(x: torch.Tensor) -> torch.Tensor:
            image, _ = opened.evaluate(x.unflatten(1, (5, 32)).transpose(0, 1), own)
            return image.transpose(0, 1).flatten(1)

        eigenvalues = torch.linalg.eigvals(jacobian(whole, z[:, sample].flatten()))
        assert float(estimate[sample]) == pytest.approx(float(eigenvalues.abs().max()), rel=0.01)


def test_complex_pairs_and_samples_of_their_own() -> None:
    rotation = torch.tensor([[0.6, -0.5], [0.5, 0.6]], dtype=torch.float64)
    matrices = torch.stack((torch.block_diag(rotation, torch.tensor(0.3)), torch.diag(torch.tensor([0.2, -0.9, 0.1]))))
    matrices = matrices.double()
    z = torch.zeros(1, 2, 3, dtype=torch.float64)
    estimate = spectral_radius(lambda z: torch.einsum("bij,sbj->sbi", matrices, z), z, iterations=60)
    assert estimate.tolist() == pytest.approx([0.61**0.5, 0.9], rel=1e-3)


def test_a_map_that_forgets_its_argument_has_radius_zero() -> None:
    estimate = spectral_radius(lambda z: 0.0 * z + 1.0, torch.ones(3, 2, 4), iterations=8)
    assert estimate.tolist() == [0.0, 0.0]

"""How strongly F contracts at an iterate: the spectral radius of its Jacobian, by power iteration.

With rho = max |eigenvalue of dF/dz at the fixed point| the undamped iteration converges like rho^k near it, if rho < 1.
The iteration runs with the *transposed* Jacobian, whose eigenvalues are the same: products with it are backward passes,
which every operation has (kernels, recomputed layers, collectives of a sharded stack); forward-mode products are not.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from megatron_implicit.solver.residual import Reduce


def transposed_jacobian(evaluate: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> (dF/dz)^T v at z, for v shaped as z, from one recorded evaluation of F.

    Args:
        evaluate: F. Parameters it reads get no gradient.
        z: [s, b, h].
    """
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        image = evaluate(leaf)
    return lambda v: torch.autograd.grad(image, leaf, v, retain_graph=True)[0]


def spectral_radius(
    evaluate: Callable[[Tensor], Tensor], z: Tensor, *, iterations: int = 32, seed: int = 0,
    reduce: Reduce = lambda sums: sums,
) -> Tensor:  # fmt: skip
    """An estimate of the spectral radius of dF/dz at z, by sample.

    The vector's growth is averaged geometrically over the second half of the iterations, so that a dominant pair of
    complex eigenvalues, which makes single steps oscillate, does not matter. The estimate has converged when more
    iterations leave it as it is: on 2-layer models of width 32, 200 iterations come within 1% of the eigenvalues.

    Args:
        evaluate: F, in which samples do not meet.
        z: [s, b, h], a fixed point or close to it.
        iterations: products with the transposed Jacobian.
        seed: of the start vector; ranks that hold different tokens may take different ones, ranks that hold the same
            tokens must not.
        reduce: sums of squares [1, b] -> the same numbers on all ranks that share z.

    Returns:
        [b], 0 where the Jacobian is nilpotent or vanishes.
    """
    product = transposed_jacobian(evaluate, z)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    v, _ = _normalised(v, reduce)
    growth = []
    for _ in range(iterations):
        v, norm = _normalised(product(v), reduce)
        growth.append(norm)
    return torch.stack(growth[iterations // 2 :]).log().mean(dim=0).exp()


def _normalised(v: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """v / ||v|| and ||v|| by sample."""
    norm = reduce(v.square().sum(dim=(0, 2)).unsqueeze(0))[0].sqrt()
    return v / norm.clamp(min=torch.finfo(v.dtype).tiny)[None, :, None], norm

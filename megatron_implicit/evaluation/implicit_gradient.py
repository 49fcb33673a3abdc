"""The exact gradient of a fixed point's loss, and the phantom gradient that training takes in its place.

With z* = F(z*; theta) and a loss L(z*), the implicit function theorem gives

    dL/dtheta = v^T dF/dtheta        where (I - dF/dz)^T v = dL/dz*

(deep equilibrium models, arXiv 1909.01377, theorem 1). v is found here by the damped iteration v <- v + damping *
(dL/dz* + (dF/dz)^T v - v), which converges wherever the damped solve of z* does: their iteration matrices are each
other's transposes. The phantom gradient (arXiv 2111.05177) differentiates a few damped steps from z* instead.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_implicit.errors import DivergedError
from megatron_implicit.evaluation.open_model import OpenModel
from megatron_implicit.layers.passes import Pass
from megatron_implicit.models.language import rotary_angles
from megatron_implicit.solver.spectrum import transposed_jacobian


class GradientProblem:
    """The loss of a text as a function of the iterate and of the decoder's parameters.

    Those act on the loss through the fixed point alone; embedding and head, which also act directly, are left out.

    Args:
        opened: an implicit model.
        rows: [b, s + 1] tokens, and the last one's label.
    """

    def __init__(self, opened: OpenModel, rows: Tensor) -> None:
        self.opened = opened
        self.ids, self.labels = rows[:, :-1].to(opened.device), rows[:, 1:].to(opened.device)
        self.parameters: list[nn.Parameter] = [p for p in opened.decoder.parameters() if p.requires_grad]
        self._angles = rotary_angles(opened.model, self.ids.shape[1])

    def solve(self) -> Tensor:
        """z*, [s, b, h], to rounding."""
        return self.opened.solve(self.ids)[0]

    def bind(self) -> Pass:
        """Everything that evaluations share, with the graph to the parameters."""
        return self.opened.decoder.begin(self.opened.embed(self.ids).detach())

    def evaluate(self, z: Tensor, bound_pass: Pass) -> Tensor:
        """F(z), [s, b, h]."""
        return self.opened.decoder.evaluate(z, bound_pass, self._angles)

    def loss(self, z: Tensor) -> Tensor:
        """Mean cross-entropy of the text in nats a token."""
        model = self.opened.model
        logits, _ = model.output_layer(z, weight=model.shared_embedding_or_output_weight())
        return F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), self.labels.flatten())

    def gradient(self, value: Tensor) -> Tensor:
        """d value / d parameters as one vector."""
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, self.parameters)])


def exact_gradient(problem: GradientProblem, z: Tensor, tolerance: float = 1e-12, limit: int = 4000) -> Tensor:
    """The implicit gradient at the fixed point z, as one vector.

    Args:
        problem: the loss.
        z: ``problem.solve()``.
        tolerance: of ||dL/dz + J^T v - v|| by ||dL/dz||.
        limit: most products with J^T.

    Raises:
        DivergedError: the iteration of v does not reach the tolerance.
    """
    leaf = z.detach().requires_grad_()
    (right,) = torch.autograd.grad(problem.loss(leaf), leaf)
    bound_pass = problem.bind()
    product = transposed_jacobian(lambda z: problem.evaluate(z, bound_pass), z)
    v, scale = right.clone(), right.norm()
    for _ in range(limit):
        change = right + product(v) - v
        v = v + problem.opened.damping * change
        if change.norm() < tolerance * scale:
            image = problem.evaluate(z.detach(), problem.bind())
            return problem.gradient((image * v.detach()).sum())
    raise DivergedError(
        f"the implicit gradient is at a residual of {float(change.norm() / scale):.1e} after {limit} products: lower "
        f"the damping of {problem.opened.damping:g}"
    )


def phantom_gradients(
    problem: GradientProblem, start: Tensor, counts: Sequence[int], damping: float
) -> dict[int, Tensor]:
    """The gradients that so many damped steps with gradient from ``start`` give, by number of steps.

    Args:
        problem: the loss.
        start: [s, b, h], where the solve without gradient ended.
        counts: numbers of steps, ascending.
        damping: tau of z <- tau * F(z) + (1 - tau) * z.
    """
    gradients = {}
    for count in counts:
        z, bound_pass = start.detach(), problem.bind()
        for _ in range(count):
            z = damping * problem.evaluate(z, bound_pass) + (1 - damping) * z
        gradients[count] = problem.gradient(problem.loss(z))
    return gradients


@torch.no_grad()
def unsolved(problem: GradientProblem, evaluations: int) -> Tensor:
    """Where ``evaluations`` undamped evaluations from 0 end, [s, b, h]: the solve of the bounded phase."""
    z, bound_pass = torch.zeros_like(problem.opened.embed(problem.ids)), problem.bind()
    for _ in range(evaluations):
        z = problem.evaluate(z, bound_pass)
    return z

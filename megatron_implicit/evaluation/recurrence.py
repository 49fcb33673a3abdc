"""The recurrence of a solved model, token to token: its Jacobian by the implicit function theorem and by autograd.

A token t is solved on the states s that earlier tokens left: z* = F(z*; s, u_t), after which its own states are
s' = S(z*; s, u_t), proposed by the same pass. Differentiating z* = F(z*; s) by s gives, with all of F, S at (z*, s),

    dz*/ds = (I - dF/dz)^-1 dF/ds        ds'/ds = dS/ds + dS/dz (I - dF/dz)^-1 dF/ds

(implicit function theorem; for one Mamba2 layer this is the state-to-state Jacobian of arXiv 2502.07827, where dS/ds is
the diagonal decay and the second term what makes an implicit model's recurrence dense). Two recurrences are looked at:

- *of states*: s are the SSM states of some Mamba2 layers; convolution windows, the states of other layers and u_t are
  held fixed. Explicit models have z = e, so that the second term is missing: ds'/ds = dS/ds, diagonal within a layer,
  and a layer reads those below it.
- *of outputs*: dz*_t / dz*_{t-1}, everything before token t-1 held fixed. z*_{t-1} acts through all that its pass
  leaves behind (convolution window and SSM state, or keys and values): z*_t = F(z*_t; S(z_{t-1}; s), u_t), and
  dz*_t / dz_{t-1} = (I - dF/dz)^-1 dF/dz_{t-1}. Explicit outputs never come back: there it is 0.

The other side is autograd through the whole solve: as many damped evaluations from z = 0 as the solve took to reach
1e-13, every one recorded.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_implicit.errors import ConfigError
from megatron_implicit.evaluation.open_model import OpenModel, States, expand, jacobian

COPIES = 16
"""Outputs of a recorded solve that are differentiated at a time: its graph holds every evaluation of every copy."""


class TokenRecurrence:
    """One token of a text, as a function of what is before it.

    Args:
        opened: the model.
        ids: [1, s] the text.
        position: t >= 1 of the token.
    """

    def __init__(self, opened: OpenModel, ids: Tensor, position: int) -> None:
        self.opened, self.position, self._ids = opened, position, ids.to(opened.device)
        self.before = opened.states_after(self._ids[:, :position])
        self.z, self.evaluations = self._solve(self.before)

    def _solve(self, before: States) -> tuple[Tensor, int]:
        """z* [h] of the token (e of an explicit model) and the evaluations that took."""
        if not self.opened.implicit:
            return self.opened.embed(self._token)[0, 0].detach(), 0
        z, evaluations = self.opened.solve(self._token, self.position, before)
        return z[0, 0], evaluations

    @property
    def _token(self) -> Tensor:
        return self._ids[:, self.position : self.position + 1]

    def evaluate(self, z: Tensor, before: States) -> tuple[Tensor, States]:
        """(F(z) [n, h], states after it), for z [n, h]."""
        image, after = self.opened.evaluate(z.unsqueeze(0), self._token, self.position, before)
        return image[0], after

    def solve_recorded(self, before: States, samples: int) -> Tensor:
        """z* [samples, h] on states that may carry a graph, every evaluation recorded."""
        start = self.z.new_zeros(1, samples, len(self.z))
        return self.opened.iterate(start, self.evaluations, self._token, self.position, before)[0]

    def map_jacobian(self) -> Tensor:
        """dF/dz at z*, [h, h]."""
        return jacobian(lambda z: self.evaluate(z, expand(self.before, len(z)))[0], self.z)

    def solved_against(self, right: Tensor) -> Tensor:
        """(I - dF/dz)^-1 right, for right [h, n]."""
        matrix = self.map_jacobian()
        return torch.linalg.solve(torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) - matrix, right)


class StateRecurrence:
    """s -> s' over the SSM states of a model's first Mamba2 layers, flattened one layer behind the other.

    Args:
        token: of a Mamba2 model.
        layers: how many.
    """

    def __init__(self, token: TokenRecurrence, layers: int) -> None:
        self.token, self._layers = token, list(token.before)[:layers]
        if any(token.before[layer][0].dim() != 3 for layer in self._layers):  # a convolution's inputs, or keys
            raise ConfigError("attention has no state of constant size: look at the recurrence of outputs")
        self._shapes = [token.before[layer][1].shape[1:] for layer in self._layers]
        self.sizes = [shape.numel() for shape in self._shapes]
        """Numbers of each layer's state."""
        self.state = self._joined(token.before)[0]
        """[d] before the token."""

    def closed_form(self, rows: Sequence[int]) -> Tensor:
        """These rows of ds'/ds, [rows, d]."""
        token = self.token
        direct = jacobian(lambda s: self._after(token.z.expand(len(s), -1), s), self.state, rows)
        if not token.opened.implicit:
            return direct
        by_z = jacobian(lambda z: self._after(z, self.state.expand(len(z), -1)), token.z, rows)
        drive = jacobian(lambda s: token.evaluate(token.z.expand(len(s), -1), self._before(s))[0], self.state)
        return direct + by_z @ token.solved_against(drive)

    def by_autograd(self, rows: Sequence[int]) -> Tensor:
        """The same through the recorded solve."""

        def step(s: Tensor) -> Tensor:
            z = self.token.solve_recorded(self._before(s), len(s))
            return self._after(z, s)

        return jacobian(step, self.state, rows, copies=COPIES)

    def _after(self, z: Tensor, s: Tensor) -> Tensor:
        return self._joined(self.token.evaluate(z, self._before(s))[1])

    def _before(self, s: Tensor) -> States:
        """[n, d] in the place of the token's own."""
        states: dict[nn.Module, tuple[Tensor, ...]] = expand(self.token.before, len(s))
        parts = s.split(self.sizes, dim=1)
        for layer, shape, part in zip(self._layers, self._shapes, parts):
            states[layer] = (states[layer][0], part.unflatten(1, shape))
        return states

    def _joined(self, states: States) -> Tensor:
        return torch.cat([states[layer][1].flatten(1) for layer in self._layers], dim=1)


class OutputRecurrence:
    """z*_{t-1} -> z*_t of an implicit model.

    Args:
        opened: the model.
        ids: [1, s] the text.
        position: t >= 2.
    """

    def __init__(self, opened: OpenModel, ids: Tensor, position: int) -> None:
        self._previous = TokenRecurrence(opened, ids, position - 1)
        self.token = TokenRecurrence(opened, ids, position)

    def closed_form(self) -> Tensor:
        """dz*_t / dz_{t-1}, [h, h]."""
        token = self.token
        drive = jacobian(lambda x: token.evaluate(token.z.expand(len(x), -1), self._left_by(x))[0], self._previous.z)
        return token.solved_against(drive)

    def by_autograd(self) -> Tensor:
        """The same through the recorded solve."""
        step: Callable[[Tensor], Tensor] = lambda x: self.token.solve_recorded(self._left_by(x), len(x))  # noqa: E731
        return jacobian(step, self._previous.z, copies=COPIES)

    def _left_by(self, x: Tensor) -> States:
        """What a pass of the token before over z_{t-1} = x [n, h] leaves behind."""
        return self._previous.evaluate(x, expand(self._previous.before, len(x)))[1]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, of matrices."""
    return float((a - b).norm() / b.norm())

"""A trained model's map F taken apart for analysis: float64, differentiable by its iterate and by its states.

Inference hides states behind a session and commits them without gradient. Here they are arguments and results::

    image, after = opened.evaluate(z, ids, start, before)      F over the tokens ``ids`` at position ``start``
    z = opened.solve(ids, start, before)                       its fixed point, to rounding
    matrix = jacobian(function, point)                         of a function that treats its rows independently
"""

from __future__ import annotations

from typing import Callable, Optional, Sequence

import torch
from torch import Tensor, nn

from megatron_implicit.api import PretrainedModel
from megatron_implicit.errors import DivergedError
from megatron_implicit.layers.norms import RMSNorm
from megatron_implicit.layers.passes import EffectiveWeight, Pass
from megatron_implicit.layers.vocabulary import VocabularyHead
from megatron_implicit.models.language import rotary_angles

States = dict[nn.Module, tuple[Tensor, ...]]
"""By layer module, batch first: (convolution inputs [b, c, taps - 1], SSM state [b, heads, p, n]) of a Mamba2 mixer,
(keys, values) [b, t, m, d] of an attention."""


class OpenModel:
    """F of a model, alone in its process.

    Args:
        lm: a loaded model; it is turned into float64 and cannot be used otherwise afterwards.
        damping: of solves: z <- damping * F(z) + (1 - damping) * z.
    """

    def __init__(self, lm: PretrainedModel, damping: float = 0.5) -> None:
        self.model, self.decoder = _in_float64(lm.model.eval()), lm.model.decoder
        self.implicit, self.damping = lm.config.implicit, damping
        self.device = next(self.model.parameters()).device
        self._weights = {
            owner: EffectiveWeight(*(None if part is None else part.detach() for part in effective))
            for owner, effective in self.decoder.effective_weights().items()
        }

    def evaluate(
        self, z: Tensor, ids: Tensor, start: int = 0, states: Optional[States] = None
    ) -> tuple[Tensor, States]:
        """(F(z) [s, b, h], the states after these tokens), with the graph to z and the states.

        Args:
            z: [s, b, h] float64; of an explicit model the embedding (see ``embed``).
            ids: [1 or b, s]; one row stands for all samples.
            start: position of the first token.
            states: before it; None at the start of a text.
        """
        holder = _OpenStates(states or {})
        bound_pass = self._pass(ids.expand(z.shape[1], -1), holder)
        angles = rotary_angles(self.model, len(z), start)
        return self.decoder.evaluate(z, bound_pass, angles), {**holder.before, **holder.after}

    def embed(self, ids: Tensor) -> Tensor:
        """e [s, b, h] of ids [b, s]."""
        return self.model.embedding(ids.to(self.device), None)

    def iterate(
        self, z: Tensor, steps: int, ids: Tensor, start: int = 0, states: Optional[States] = None
    ) -> Tensor:
        """``steps`` damped evaluations from z on, recorded where gradients are enabled."""
        for _ in range(steps):
            image, _ = self.evaluate(z, ids, start, states)
            z = self.damping * image + (1 - self.damping) * z
        return z

    @torch.no_grad()
    def solve(
        self, ids: Tensor, start: int = 0, states: Optional[States] = None, *,
        tolerance: float = 1e-13, limit: int = 2000,
    ) -> tuple[Tensor, int]:  # fmt: skip
        """(z with z = F(z), [s, b, h]; evaluations), every token to the tolerance.

        Raises:
            DivergedError: it is not reached within ``limit`` evaluations.
        """
        z = torch.zeros_like(self.embed(ids))
        for count in range(1, limit + 1):
            image, _ = self.evaluate(z, ids, start, states)
            residual = ((image - z).norm(dim=-1) / image.norm(dim=-1)).max().item()
            z = self.damping * image + (1 - self.damping) * z
            if residual < tolerance:
                return z, count
        raise DivergedError(
            f"the solve of {ids.shape[1]} tokens is at a residual of {residual:.1e} after {limit} evaluations, not "
            f"below {tolerance:g}: lower the damping of {self.damping:g}, or take a model whose iteration converges"
        )

    @torch.no_grad()
    def states_after(self, ids: Tensor) -> States:
        """The states that a solved text [1, s] leaves behind."""
        z = self.solve(ids)[0] if self.implicit else self.embed(ids)
        return self.evaluate(z, ids)[1]

    def _pass(self, ids: Tensor, states: "_OpenStates") -> Pass:
        with torch.no_grad():
            return self.decoder.begin(self.embed(ids), states, self._weights)


def _in_float64(model: nn.Module) -> nn.Module:
    """Parameters, and what modules round to."""
    model.double()
    model.config.params_dtype = torch.float64  # layers share this configuration
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.out_dtype = torch.float64
        elif isinstance(module, VocabularyHead):
            module.dtype = torch.float64
        elif hasattr(module, "residual_in_fp32"):
            module.residual_in_fp32 = False
    return model


class _OpenStates:
    """States that are handed to the layers and taken from them, with their graph."""

    lengths = counting = None

    def __init__(self, before: States) -> None:
        self.before, self.after = before, States()

    def committed(self, layer: nn.Module) -> Optional[tuple[Tensor, ...]]:
        """Of a recurrent layer, before these tokens."""
        return self.before.get(layer)

    def propose(self, layer: nn.Module, state: tuple[Tensor, ...]) -> None:
        """Of a recurrent layer, after these tokens."""
        self.after[layer] = state

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, None]:
        """Keys and values [s, b, m, d] behind those of the tokens before."""
        new = (key.transpose(0, 1), value.transpose(0, 1))
        before = self.before.get(layer)
        self.after[layer] = new if before is None else tuple(torch.cat(pair, dim=1) for pair in zip(before, new))
        keys, values = self.after[layer]
        return keys.transpose(0, 1), values.transpose(0, 1), None


def expand(states: States, samples: int) -> States:
    """The states of one sample for many."""
    return {layer: tuple(part.expand(samples, *part.shape[1:]) for part in parts) for layer, parts in states.items()}


def jacobian(
    function: Callable[[Tensor], Tensor], point: Tensor, rows: Optional[Sequence[int]] = None, copies: int = 64
) -> Tensor:
    """The Jacobian of a function that treats the rows of its argument independently, by backward passes.

    Args:
        function: [n, d] -> [n, m], for any n.
        point: [d].
        rows: outputs to differentiate; None takes all.
        copies: outputs at a time, each by a copy of the point: more are faster and take more memory.

    Returns:
        [rows, d].
    """
    if rows is None:
        with torch.no_grad():
            rows = range(function(point.unsqueeze(0)).shape[1])
    parts = []
    for first in range(0, len(rows), copies):
        chosen = torch.as_tensor(rows[first : first + copies], device=point.device)
        inputs = point.expand(len(chosen), -1).clone().requires_grad_()
        with torch.enable_grad():
            outputs = function(inputs).gather(1, chosen[:, None])
        parts.append(torch.autograd.grad(outputs.sum(), inputs)[0])
    return torch.cat(parts)


def off_diagonal_mass(matrix: Tensor, rows: Optional[Sequence[int]] = None) -> float:
    """The share of a square matrix's sum of magnitudes that lies off its diagonal: 0 of a diagonal one.

    Args:
        matrix: [n, n], or some of its rows.
        rows: which those are, [matrix rows].
    """
    magnitudes = matrix.abs()
    places = torch.arange(len(matrix)) if rows is None else torch.as_tensor(rows)
    off_diagonal = magnitudes.scatter(1, places.to(matrix.device)[:, None], 0.0)
    return float(off_diagonal.sum() / magnitudes.sum())

"""The window solve: only the tokens [front, front + w) iterate, and what has settled is committed behind them."""

from __future__ import annotations

import dataclasses
from typing import Callable, Optional, Sequence

import torch
from torch import Tensor

from megatron_implicit.inference.session import InferenceSession, Solved
from megatron_implicit.layers.passes import Pass
from megatron_implicit.solver import Step, WindowSolve, drive


def solve_in_window(
    session: InferenceSession, input_ids: Tensor, lengths: Optional[Sequence[int]], window: int
) -> Solved:
    """Solves the next tokens of every sample and commits them; arguments as ``InferenceSession.advance``."""
    driver = _WindowDriver(session, input_ids, lengths, window)
    drive(driver.solve, driver.evaluate)
    return Solved(driver.hidden[:-1], driver.solve.trace(), session.last)


class _WindowDriver:
    """Evaluates F where the solve's window is, and commits the tokens it lets go."""

    def __init__(
        self, session: InferenceSession, input_ids: Tensor, lengths: Optional[Sequence[int]], window: int
    ) -> None:
        batch, tokens = input_ids.shape
        embedding, self._pass = session.embed(input_ids)
        self._session, self._window = session, window
        self._remaining = [tokens] * batch if lengths is None else list(lengths)
        self.solve = WindowSolve(
            session.settings, window, self._remaining, embedding.shape[-1], embedding.device, session.decoder.reduce,
            tokens,
        )  # fmt: skip
        # One row more than there are tokens: what is not accepted is written there.
        self.hidden = torch.zeros(tokens + 1, batch, embedding.shape[-1], device=embedding.device)
        self._over_window: Optional[Callable[[Tensor], Tensor]] = None

    def evaluate(self, z: Tensor, step: Step) -> Tensor:
        """F over the window, or (OUTPUT) over its accepted tokens, which are then committed."""
        if step is Step.OUTPUT:
            return self._commit(z)
        if self._over_window is None:
            present = [min(self._window, remaining) for remaining in self._remaining]
            self._over_window = self._session.bind(self._pass_at(self._window), self._window, present)
        return self._over_window(z)

    def _commit(self, z: Tensor) -> Tensor:
        counts = self.solve.accepted
        tokens = len(z)
        image = self._session.bind(self._pass_at(tokens), tokens, counts)(z)
        places = self.solve.places()[:tokens]
        if self._session.states.counting is not None:
            places = places.masked_fill(~self._session.states.counting.T, len(self.hidden) - 1)
        self.hidden.scatter_(0, places[:, :, None].expand_as(image), image)
        self._session.accept(image)
        self._remaining = [remaining - count for remaining, count in zip(self._remaining, counts)]
        self._over_window = None
        return image

    def _pass_at(self, tokens: int) -> Pass:
        """The pass with the injection of the window's first tokens."""
        injection = self._pass.injection
        places = self.solve.places()[:tokens].clamp(max=len(injection) - 1)
        here = injection.gather(0, places[:, :, None].expand(-1, -1, injection.shape[-1]))
        return dataclasses.replace(self._pass, injection=here)

"""The machine over a sliding window of tokens: what has settled at its front leaves it for good.

A solve of a whole sequence iterates every token until the last one has settled. Where information moves through the
sequence like a front, most of those evaluations are spent far before or far behind it. The window iterates only the
tokens [front, front + w): each leading token whose residual is below the tolerance is accepted, and new tokens enter
at the back. Its stopping rule, damping and statistics are ``FixedPointSolve``'s, decided by token instead of by sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional, Sequence

import torch
from torch import Tensor

from megatron_implicit.errors import NonFiniteIterateError
from megatron_implicit.solver.machine import STAGNATION_PROGRESS, Answers, Decision, FixedPointSolve, Step
from megatron_implicit.solver.residual import Reduce, token_residual
from megatron_implicit.solver.settings import SolveSettings
from megatron_implicit.solver.trace import SolveTrace


class WindowSolve(FixedPointSolve):
    """One solve of a batch, window by window; every sample has a front of its own.

    After SOLVE decisions the driver reports F over the window, from the states before its front. OUTPUT asks for one
    more evaluation, of the first ``accepted`` tokens of each sample alone, whose states are then committed; reported
    like any other, it moves the window on. DONE comes when every token has been accepted.

    A token at the front is accepted once its residual is below the tolerance. So that one restless token cannot stall
    a sample for ever, it is accepted unconverged when its residual has not come below 0.9 of what it was within
    ``settings.patience`` evaluations, or after ``settings.max_iterations`` at the front.

    Args:
        settings: an inference solve; ``stop`` has no meaning here, since every token of a window iterates.
        window: tokens w of the window.
        lengths: [b] tokens of each sample.
        width: h.
        device: of the iterate.
        reduce: sums of squares [2, w, b] -> the same numbers on all ranks that share the iterate.
        tokens: s of the batch, padding included; None is the longest sample's.
    """

    def __init__(
        self, settings: SolveSettings, window: int, lengths: Sequence[int], width: int, device: torch.device,
        reduce: Reduce = lambda sums: sums, tokens: Optional[int] = None,
    ) -> None:  # fmt: skip
        self.fronts = torch.zeros(len(lengths), dtype=torch.long, device=device)
        """[b] position of each sample's front."""
        self.accepted: list[int] = [0] * len(lengths)
        """Leading tokens of the window that the current OUTPUT decision accepts, by sample."""
        self._lengths = torch.tensor(lengths, device=device)
        self._offsets = torch.arange(window, device=device)[:, None]
        self._total = max(lengths) if tokens is None else tokens
        start = torch.zeros(window, len(lengths), width, device=device)
        super().__init__(replace(settings, stop="batch"), start, reduce, self._present())
        self._front_since = torch.zeros_like(self.fronts)
        self._front_lowest = torch.full_like(self.fronts, 1e8, dtype=torch.float32)
        self._front_lowest_at = torch.zeros_like(self.fronts)
        self._history: list[tuple[Tensor, Tensor, Tensor]] = []
        # One column more than there are tokens: what does not belong to a token is written there.
        self._left = {name: self._results(torch.long) for name in ("iterations", "evaluations")}
        self._left["converged"] = self._results(torch.bool)

    def places(self) -> Tensor:
        """[w, b] position of each token of the window in its sample; beyond its end there is none."""
        return self.fronts + self._offsets

    def update(self, image: Tensor) -> Decision:
        """Takes F of the last decision's z and decides; of an OUTPUT decision only that it was evaluated.

        Raises:
            NonFiniteIterateError: a residual is NaN or infinite.
        """
        return self._slide() if self._step is Step.OUTPUT else super().update(image)

    def trace(self) -> SolveTrace:
        """Statistics by token, [b, s]; the padding of shorter samples has converged without evaluations."""
        padding = torch.arange(self._total, device=self.fronts.device) >= self._lengths[:, None]
        left = {name: values[:, :-1] for name, values in self._left.items()}
        return SolveTrace(
            left["iterations"], left["evaluations"], self._residuals_by_token(), left["converged"] | padding
        )

    # ---------------------------------------------------------------- by unit: a token

    @staticmethod
    def _units(counting: Tensor | None, start: Tensor) -> Tensor:
        return counting.clone()

    @staticmethod
    def _spread(units: Tensor) -> Tensor:
        return units[:, :, None]

    def _measure(self, image: Tensor) -> Tensor:
        residual = token_residual(image, self._z, self.settings, self._reduce)
        self._watch_fronts(residual[0])
        places = self.places().masked_fill(~self._active, self._total)
        self._history.append((places, self._evaluations.clone(), residual))
        return residual

    def _ask(self, improved: Tensor) -> Answers:
        return Answers(False, False, False, False)  # _decide asks

    def _record(self, residual: Tensor) -> None:
        super()._record(residual)
        self._residuals.clear()  # the history has them, by place

    def _decide(self, answers: Answers) -> Decision:
        settled = self._converged & self._active
        settled[0] |= self._given_up & self._active[0]
        accepted = settled.long().cumprod(0).sum(0)
        *self.accepted, broken = torch.cat((accepted, self._broken_at.any()[None].long())).tolist()
        if broken:
            raise NonFiniteIterateError.of(self._broken_at.amax(0))
        if not any(self.accepted):
            return Decision(Step.SOLVE, self._z)
        self._step = Step.OUTPUT
        return Decision(Step.OUTPUT, self._z[: max(self.accepted)])

    def _watch_fronts(self, residual: Tensor) -> None:
        """Patience with the tokens at the front: residual [b]. Called before the evaluation is counted."""
        now = self._count + 1
        progressed = residual < STAGNATION_PROGRESS * self._front_lowest
        self._front_lowest = torch.where(progressed, residual, self._front_lowest)
        self._front_lowest_at = torch.where(progressed, now, self._front_lowest_at)
        self._given_up = now - self._front_lowest_at >= self.settings.patience
        self._given_up |= now - self._front_since >= self.settings.max_iterations

    # ---------------------------------------------------------------- moving on

    def _present(self) -> Tensor:
        """[w, b] whether the window's tokens exist."""
        return self.places() < self._lengths

    def _slide(self) -> Decision:
        """Lets the accepted tokens go and new ones enter at the back, from z0 or from the iterate before them."""
        counts = torch.tensor(self.accepted, device=self.fronts.device)
        leaving = self._offsets < counts
        places = self.places().masked_fill(~leaving, self._total).T
        for name, values in self._left.items():
            values.scatter_(1, places, getattr(self, f"_{name}").T)
        window = len(self._offsets)
        source = (self._offsets + counts).clamp(max=window - 1)
        entering = self._offsets + counts >= window
        for name in ("_iterations", "_evaluations", "_broken_at"):
            setattr(self, name, getattr(self, name).gather(0, source).masked_fill(entering, 0))
        z = self._z.gather(0, source[:, :, None].expand_as(self._z))
        self._z = z if self.settings.warm_start else z.masked_fill(entering[:, :, None], 0.0)
        self.fronts = self.fronts + counts
        self._active = self._present()
        self._converged = ~self._active
        moved = counts > 0
        self._front_lowest = self._front_lowest.masked_fill(moved, 1e8)
        self._front_lowest_at, self._front_since = (
            torch.where(moved, self._count, since) for since in (self._front_lowest_at, self._front_since)
        )
        finished = bool((self.fronts >= self._lengths).all())
        self._step = Step.DONE if finished else Step.SOLVE
        return Decision(self._step, self._z)

    # ---------------------------------------------------------------- statistics

    def _results(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(self._lengths), self._total + 1, dtype=dtype, device=self.fronts.device)

    def _residuals_by_token(self) -> Tensor:
        """[b, s, evaluations]: the residuals that each token saw while it was in the window."""
        places, counts, residuals = (torch.stack(parts, dim=-1) for parts in zip(*self._history))
        longest = int(self._left["evaluations"][:, :-1].max())
        table = residuals.new_full((places.shape[1], (self._total + 1) * longest), float("nan"))
        where = places * longest + counts.clamp(max=longest - 1)
        table.scatter_(1, where.transpose(0, 1).flatten(1), residuals.transpose(0, 1).flatten(1))
        return table.view(len(table), self._total + 1, longest)[:, :-1]

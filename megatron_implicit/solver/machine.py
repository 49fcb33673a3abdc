"""The state machine of a fixed-point solve: ``update(F(z))`` says what to evaluate next, and with what gradient."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_implicit.errors import NonFiniteIterateError
from megatron_implicit.solver.residual import Reduce, Residual, relative_residual
from megatron_implicit.solver.settings import SolveSettings
from megatron_implicit.solver.trace import SolveTrace

STAGNATION_PATIENCE = 4
"""Evaluations without a new lowest residual after which a sample falls back to the smaller damping."""


class Step(enum.Enum):
    """What the driver does with a decision's z."""

    SOLVE = "solve"
    """Evaluate F(z) without gradient and report it."""
    PHANTOM = "phantom"
    """Evaluate F(z) with gradient and report it."""
    OUTPUT = "output"
    """Evaluate F(z) once more, without gradient, and report it: what it computes is the result, states included."""
    DONE = "done"
    """z is the result."""


@dataclass(frozen=True)
class Decision:
    """The machine's answer."""

    step: Step
    z: Tensor
    """[s, b, h] float32."""


class FixedPointSolve:
    """One solve of one microbatch.

    Args:
        settings: which solve.
        start: z0, [s, b, h] float32 (zeros, in training and inference alike).
        reduce: sums of squares [2, b] -> the same numbers on all ranks that share the iterate.

    A driver asks ``first()`` and then reports every evaluation to ``update()`` until the answer is DONE.
    """

    def __init__(self, settings: SolveSettings, start: Tensor, reduce: Reduce = lambda sums: sums) -> None:
        self.settings = settings
        self._reduce = reduce
        self._z = start
        batch, device = start.shape[1], start.device
        self._best = start
        self._lowest = torch.full((batch,), 1e8, device=device)
        self._iterations = torch.zeros(batch, dtype=torch.long, device=device)
        self._evaluations = torch.zeros(batch, dtype=torch.long, device=device)
        self._active = torch.ones(batch, dtype=torch.bool, device=device)
        self._converged = torch.zeros(batch, dtype=torch.bool, device=device)
        self._broken_at = torch.zeros(batch, dtype=torch.long, device=device)  # 0: the iterate is finite
        # Where the host sees the numbers anyway (a CPU, or a decision that is waited for) it may skip a selection.
        self._asking_is_free = settings.reads_host or device.type == "cpu"
        self._residuals: list[Tensor] = []
        self._last: Residual | None = None
        self._count = 0
        self._phantom_count = 0
        self._step = Step.PHANTOM if settings.gradient == "unrolled" else Step.SOLVE

    def first(self) -> Decision:
        """The first evaluation: of z0."""
        return Decision(self._step, self._z)

    def update(self, image: Tensor) -> Decision:
        """Takes F(z) of the last decision's z and decides.

        Raises:
            NonFiniteIterateError: a residual is NaN or infinite (noticed at the end of the solve when the number of
                evaluations is fixed, so that the device need not be waited for).
        """
        if self._step is Step.PHANTOM:
            return self._update_with_gradient(image)
        if self._step is Step.OUTPUT:
            return self._finish(image)
        return self._update_solve(image)

    def trace(self) -> SolveTrace:
        """Statistics of the solve so far, on the device: reading them waits for it."""
        if not self._residuals:
            batch = self._lowest.numel()
            count = torch.full((batch,), self._phantom_count, dtype=torch.long)
            return SolveTrace(count, count, torch.full((batch, 1), float("nan")), torch.zeros(batch, dtype=torch.bool))
        return SolveTrace(
            iterations=self._iterations,
            evaluations=self._evaluations,
            residuals=torch.stack(self._residuals, dim=1),
            converged=self._converged,
            token_residuals=self._last.token,
        )

    # ---------------------------------------------------------------- the solve, without gradient

    def _update_solve(self, image: Tensor) -> Decision:
        residual = relative_residual(image, self._z, self.settings, self._reduce)
        self._count += 1
        self._record(residual)
        self._accept(image, residual.sample)
        self._advance(image)
        if self._count >= self.settings.max_iterations or self._all_converged():
            return self._leave_solve()
        return Decision(Step.SOLVE, self._z)

    def _record(self, residual: Residual) -> None:
        sample = residual.sample
        self._last = residual
        self._residuals.append(torch.where(self._active, sample, float("nan")))
        broken = self._active & ~torch.isfinite(sample) & (self._broken_at == 0)
        self._broken_at = torch.where(broken, self._count, self._broken_at)
        self._evaluations += self._active
        self._converged = torch.where(self._active, sample < self.settings.tolerance, self._converged)

    def _accept(self, image: Tensor, sample: Tensor) -> None:
        """Keeps each sample's lowest-residual image (training); in inference the last iterate counts."""
        if self.settings.accept == "last":
            self._iterations = torch.where(self._active, self._count, self._iterations)
            return
        improved = self._active & (sample < self._lowest)
        self._lowest = torch.where(improved, sample, self._lowest)
        self._iterations = torch.where(improved, self._count, self._iterations)
        if self._asking_is_free and bool(improved.all()):
            self._best = image
        else:
            self._best = torch.where(improved[None, :, None], image, self._best)

    def _advance(self, image: Tensor) -> None:
        """z <- damping * F(z) + (1 - damping) * z; frozen samples stay."""
        damping = self.settings.damping
        if self.settings.fallback_damping is not None:
            stalled = self._count - self._iterations >= STAGNATION_PATIENCE
            damping = torch.where(stalled, self.settings.fallback_damping, damping)[None, :, None]
            proposal = damping * image + (1 - damping) * self._z
        else:
            proposal = image if damping == 1.0 else damping * image + (1 - damping) * self._z
        if self.settings.stop == "sample" and not (self._asking_is_free and bool(self._active.all())):
            proposal = torch.where(self._active[None, :, None], proposal, self._z)
        self._z = proposal

    def _all_converged(self) -> bool:
        """Whether to stop; the one place where a data-dependent solve waits for the device."""
        if not self.settings.reads_host:
            return False
        self._refuse_non_finite()
        if self.settings.stop == "sample":
            self._active = self._active & ~self._converged
            return not bool(self._active.any())
        return bool(self._converged.all())

    # ---------------------------------------------------------------- after the solve

    def _leave_solve(self) -> Decision:
        self._refuse_non_finite()
        if self.settings.accept == "best":
            self._z = self._best
        self._best = None  # frees its memory before the passes with gradient
        self._step = Step.OUTPUT if self.settings.gradient == "none" else Step.PHANTOM
        return Decision(self._step, self._z)

    def _update_with_gradient(self, image: Tensor) -> Decision:
        unrolled = self.settings.gradient == "unrolled"
        damping = self.settings.phantom_damping
        # The unrolled iteration starts with z = F(0), undamped.
        undamped = damping == 1.0 or (unrolled and self._phantom_count == 0)
        self._z = image if undamped else damping * image + (1 - damping) * self._z
        self._phantom_count += 1
        passes = self.settings.max_iterations if unrolled else self.settings.phantom_steps
        return self._finish(self._z) if self._phantom_count >= passes else Decision(Step.PHANTOM, self._z)

    def _finish(self, z: Tensor) -> Decision:
        self._z, self._step = z, Step.DONE
        return Decision(Step.DONE, z)

    def _refuse_non_finite(self) -> None:
        if bool(self._broken_at.any()):
            first = int(self._broken_at[self._broken_at > 0].min())
            samples = (self._broken_at == first).nonzero().flatten().tolist()
            raise NonFiniteIterateError(evaluation=first, samples=samples)

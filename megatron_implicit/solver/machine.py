"""The state machine of a fixed-point solve: ``update(F(z))`` says what to evaluate next, and with what gradient."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_implicit.errors import NonFiniteIterateError
from megatron_implicit.solver.residual import Reduce, relative_residual
from megatron_implicit.solver.settings import SolveSettings
from megatron_implicit.solver.trace import SolveTrace

STAGNATION_PATIENCE, STAGNATION_PROGRESS = 4, 0.9
"""A sample whose residual has not come below 0.9 of what it was, within 4 evaluations, falls back to the smaller
damping and stays there: it may sit in a limit cycle, or creep."""


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


class Answers(NamedTuple):
    """What the host learns of one evaluation."""

    all_improved: bool
    all_active: bool
    broken: bool
    done: bool


class FixedPointSolve:
    """One solve of one microbatch.

    Args:
        settings: which solve.
        start: z0, [s, b, h] float32 (zeros, in training and inference alike).
        reduce: sums of squares [2, b] -> the same numbers on all ranks that share the iterate.
        counting: [s, b] bool, which tokens belong to their sample and are not padding; None: all. A sample without
            any has converged before it begins.

    What is decided, it decides by *unit*: here a unit is a sample; ``window.WindowSolve`` decides by token.

    A driver asks ``first()`` and then reports every evaluation to ``update()`` until the answer is DONE.
    """

    def __init__(
        self, settings: SolveSettings, start: Tensor, reduce: Reduce = lambda sums: sums,
        counting: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings
        self._reduce = reduce
        self._counting = counting
        self._z = start
        device = start.device
        self._best = start
        self._active = self._units(counting, start)
        self._lowest = torch.full(self._active.shape, 1e8, device=device)
        self._iterations = torch.zeros_like(self._active, dtype=torch.long)
        self._evaluations = torch.zeros_like(self._iterations)
        self._converged = ~self._active
        self._broken_at = torch.zeros_like(self._iterations)  # 0: the iterate is finite
        self._stalled = torch.zeros_like(self._active)
        self._milestone, self._milestone_at = self._lowest, torch.zeros_like(self._broken_at)
        # Where the host sees the numbers anyway (a CPU, or a decision that is waited for) it may skip a selection.
        self._asking_is_free = settings.reads_host or device.type == "cpu"
        self._residuals: list[Tensor] = []
        self._last_by_token: Tensor | None = None
        self._count = 0
        self._phantom_count = 0
        self._step = Step.PHANTOM if settings.gradient == "unrolled" else Step.SOLVE

    def first(self) -> Decision:
        """The first evaluation: of z0."""
        return Decision(self._step, self._z)

    def update(self, image: Tensor) -> Decision:
        """Takes F(z) of the last decision's z and decides.

        Raises:
            NonFiniteIterateError: a residual is NaN or infinite, in inference. In training ``trace().broken_at`` tells,
                and the solve ends early where the device is waited for.
        """
        if self._step is Step.PHANTOM:
            return self._update_with_gradient(image)
        if self._step is Step.OUTPUT:
            return self._finish(image)
        return self._update_solve(image)

    def cut(self) -> Tensor:
        """Goes on from a leaf with the value of the last decision's z, and returns it.

        For drivers that run the backward pass of every pass with gradient by itself: the leaf's gradient is then what
        the damped part of the next update owes to z.
        """
        self._z = self._z.detach().requires_grad_()
        return self._z

    def trace(self) -> SolveTrace:
        """Statistics of the solve so far, on the device: reading them waits for it."""
        if not self._residuals:
            count = torch.full_like(self._broken_at, self._phantom_count)
            nothing = torch.full_like(self._lowest, float("nan")).unsqueeze(1)
            return SolveTrace(count, count, nothing, self._converged, broken_at=self._broken_at)
        return SolveTrace(
            iterations=self._iterations,
            evaluations=self._evaluations,
            residuals=torch.stack(self._residuals, dim=1),
            converged=self._lowest < self.settings.tolerance if self.settings.accept == "best" else self._converged,
            token_residuals=self._last_by_token,
            broken_at=self._broken_at,
        )

    # ---------------------------------------------------------------- by unit: a sample

    @staticmethod
    def _units(counting: Tensor | None, start: Tensor) -> Tensor:
        """Which units there are to solve: [b] bool."""
        if counting is None:
            return torch.ones(start.shape[1], dtype=torch.bool, device=start.device)
        return counting.any(0)

    @staticmethod
    def _spread(units: Tensor) -> Tensor:
        """Values by unit, to meet an iterate [s, b, h]."""
        return units[None, :, None]

    def _measure(self, image: Tensor) -> Tensor:
        """Residuals by unit."""
        residual = relative_residual(image, self._z, self.settings, self._reduce, self._counting)
        self._last_by_token = residual.token
        return residual.sample

    def _decide(self, answers: Answers) -> Decision:
        """The stopping rule."""
        if self.settings.stop == "sample":
            self._active = self._active & ~self._converged
        if self._count >= self.settings.max_iterations or (answers.done and self.settings.reads_host):
            return self._leave_solve()
        return Decision(Step.SOLVE, self._z)

    # ---------------------------------------------------------------- the solve, without gradient

    def _update_solve(self, image: Tensor) -> Decision:
        residual = self._measure(image)
        self._count += 1
        self._record(residual)
        improved = self._active & (residual < self._lowest)
        answers = self._ask(improved)
        self._accept(image, residual, improved, answers.all_improved)
        self._advance(image, answers.all_active)
        if answers.broken:
            return self._leave_broken()
        return self._decide(answers)

    def _ask(self, improved: Tensor) -> Answers:
        """The one place where a solve waits for the device: all questions of an evaluation at once."""
        if not self._asking_is_free:
            return Answers(False, False, False, False)
        waiting = self._active & ~self._converged if self.settings.stop == "sample" else ~self._converged
        questions = (improved.all(), self._active.all(), self._broken_at.any(), ~waiting.any())
        return Answers(*torch.stack(questions).tolist())

    def _record(self, residual: Tensor) -> None:
        self._residuals.append(torch.where(self._active, residual, float("nan")))
        broken = self._active & ~torch.isfinite(residual) & (self._broken_at == 0)
        self._broken_at = torch.where(broken, self._count, self._broken_at)
        self._evaluations += self._active
        self._converged = torch.where(self._active, residual < self.settings.tolerance, self._converged)

    def _accept(self, image: Tensor, residual: Tensor, improved: Tensor, all_improved: bool) -> None:
        """Keeps each sample's lowest-residual image (training); in inference the last iterate counts."""
        if self.settings.accept == "last":
            self._iterations = torch.where(self._active, self._evaluations, self._iterations)
            return
        self._lowest = torch.where(improved, residual, self._lowest)
        self._iterations = torch.where(improved, self._count, self._iterations)
        self._best = image if all_improved else torch.where(self._spread(improved), image, self._best)

    def _advance(self, image: Tensor, all_active: bool) -> None:
        """z <- damping * F(z) + (1 - damping) * z; frozen samples stay."""
        damping = self.settings.damping
        if self.settings.fallback_damping is not None:
            progressed = self._lowest < STAGNATION_PROGRESS * self._milestone
            self._milestone = torch.where(progressed, self._lowest, self._milestone)
            self._milestone_at = torch.where(progressed, self._count, self._milestone_at)
            self._stalled |= self._count - self._milestone_at >= STAGNATION_PATIENCE
            damping = self._spread(torch.where(self._stalled, self.settings.fallback_damping, damping))
            proposal = damping * image + (1 - damping) * self._z
        else:
            proposal = image if damping == 1.0 else damping * image + (1 - damping) * self._z
        if self.settings.stop == "sample" and not all_active:
            proposal = torch.where(self._spread(self._active), proposal, self._z)
        self._z = proposal

    # ---------------------------------------------------------------- after the solve

    def _leave_solve(self) -> Decision:
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
        finite = torch.isfinite(image.detach().sum(dim=(0, 2)))
        broken = ~finite & (self._broken_at == 0)
        self._broken_at = torch.where(broken, self._count + self._phantom_count, self._broken_at)
        passes = self.settings.max_iterations if unrolled else self.settings.phantom_steps
        return self._finish(self._z) if self._phantom_count >= passes else Decision(Step.PHANTOM, self._z)

    def _finish(self, z: Tensor) -> Decision:
        self._z, self._step = z, Step.DONE
        return Decision(Step.DONE, z)

    def _leave_broken(self) -> Decision:
        """A training step is completed, so that all ranks and stages come to its end and judge it there together."""
        if self.settings.accept == "best":
            return self._leave_solve()
        raise NonFiniteIterateError.of(self._broken_at)

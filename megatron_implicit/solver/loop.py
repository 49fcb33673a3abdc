"""The local loop: one process (or one tensor-parallel group) evaluates all of F."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from megatron_implicit.solver.machine import FixedPointSolve, Step


def drive(solve: FixedPointSolve, evaluate: Callable[[Tensor, Step], Tensor]) -> Tensor:
    """Evaluates what the machine asks for until it is done.

    Args:
        solve: a fresh solve.
        evaluate: F; called with z [s, b, h] and the step it is evaluated for.

    Returns:
        the accepted z, [s, b, h]; it carries a graph if the passes with gradient ran under autograd.
    """
    decision = solve.first()
    while decision.step is not Step.DONE:
        with torch.set_grad_enabled(torch.is_grad_enabled() and decision.step is Step.PHANTOM):
            image = evaluate(decision.z, decision.step)
        decision = solve.update(image)
    return decision.z

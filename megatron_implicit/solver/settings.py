"""What one solve does: the training solve and the inference solve of the reference, as two values of one type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_implicit.config import InferenceConfig, SolverConfig
from megatron_implicit.config.validate import validate_inference, validate_solver
from megatron_implicit.errors import ConfigError

ResidualNorm = Literal["sample", "batch", "token"]


@dataclass(frozen=True)
class SolveSettings:
    """One solve. ``training`` follows torchdeq's fixed-point iteration as the reference uses it, ``inference`` the
    reference's damped evaluation loop; source: microsoft/implicit_languagemodels at 84a0bf3."""

    max_iterations: int
    """Most evaluations of the solve itself; phantom passes and the output pass come on top."""
    tolerance: float
    """Relative residual under which a sample has converged; 0 never stops early and never asks the host."""
    damping: float
    """z <- damping * F(z) + (1 - damping) * z."""
    fallback_damping: float | None
    """Damping of a sample whose residual stagnates; None keeps ``damping``."""
    stop: Literal["batch", "sample"]
    """Whether a converged sample goes on with its companions or is frozen."""
    relative_to: Literal["image", "iterate"]
    """Residual ||F(z) - z|| divided by ||F(z)|| (training) or by ||z|| (inference)."""
    epsilon: float
    """Added to that divisor: 1e-9 in training, 1e-6 in inference, as in the reference."""
    norm: ResidualNorm
    """One residual a sample over all its tokens, the reference's one for the whole batch, or that of a sample's most
    restless token (which needs every rank to hold the whole sequence)."""
    accept: Literal["best", "last"]
    """Go on from each sample's lowest-residual image (training), or from the last iterate (inference)."""
    gradient: Literal["phantom", "unrolled", "none"]
    """phantom: damped passes with gradient after the solve; unrolled: all passes with gradient; none: one undamped
    output pass."""
    phantom_steps: int
    """Passes with gradient of ``gradient=phantom``."""
    phantom_damping: float
    """Damping of the passes with gradient."""
    patience: int = 8
    """Window solves: evaluations a token at the front may go without progress before it is accepted as it is."""
    warm_start: bool = False
    """Solves of part of a sequence: new tokens start from the iterate of the token before them instead of z0 = 0."""

    @property
    def reads_host(self) -> bool:
        """Whether the number of evaluations depends on the data, so that each decision waits for the device."""
        return self.tolerance > 0

    @classmethod
    def training(cls, solver: SolverConfig, *, norm: ResidualNorm = "sample") -> "SolveSettings":
        """The solve of a training forward pass."""
        return cls(
            max_iterations=solver.max_iterations,
            tolerance=solver.tolerance,
            damping=solver.damping,
            fallback_damping=solver.fallback_damping,
            stop=solver.stop,
            relative_to="image",
            epsilon=1e-9,
            norm=norm,
            accept="best",
            gradient=solver.gradient,
            phantom_steps=solver.phantom_steps,
            phantom_damping=solver.phantom_damping,
        )

    @classmethod
    def inference(cls, inference: InferenceConfig, *, norm: ResidualNorm = "sample") -> "SolveSettings":
        """The solve of an evaluation or generation: max_iterations counts the output pass, as the reference does."""
        return cls(
            max_iterations=inference.max_iterations - 1,
            tolerance=inference.tolerance,
            damping=inference.damping,
            fallback_damping=None,
            stop=inference.stop,
            relative_to="iterate",
            epsilon=1e-6,
            norm=norm,
            accept="last",
            gradient="none",
            phantom_steps=0,
            phantom_damping=1.0,
            patience=inference.patience,
            warm_start=inference.warm_start,
        )


def override(section: Any, overrides: dict[str, Any]) -> Any:
    """A solver or inference section with some values replaced.

    Raises:
        ConfigError: an override that the section does not have, or an impossible value, by name.
    """
    known = vars(section)
    for name in overrides:
        if name not in known:
            raise ConfigError(f"solver override '{name}' is unknown: use one of {', '.join(known)}")
    changed = replace(section, **overrides)
    if isinstance(changed, SolverConfig):
        validate_solver("solver", changed)
    else:
        validate_inference("inference", changed)
    return changed

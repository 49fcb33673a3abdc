"""Judges every step before its update: what is bad about it, and what the configuration wants done."""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Iterator, Optional

from megatron_implicit.config import HealthConfig
from megatron_implicit.errors import DivergedError

KINDS = ("nonfinite", "divergence", "gradient_spike", "loss_spike")
"""What can be wrong with a step, the worst first."""


class Action(enum.IntEnum):
    """What is done with a step; of two, the larger wins."""

    ACCEPT = 0
    """The update is made."""
    SKIP = 1
    """The update is left out; data and schedule move on."""
    RETRY = 2
    """Forward and backward are done again from the same state."""
    STOP = 3
    """The run ends."""


_POLICIES = {"log": Action.ACCEPT, "skip": Action.SKIP, "retry": Action.RETRY, "stop": Action.STOP}


@dataclass(frozen=True)
class Finding:
    """Something bad about a step."""

    kind: str
    """One of KINDS."""
    message: str
    """The numbers that show it."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step."""

    action: Action
    findings: tuple[Finding, ...] = ()

    @property
    def severity(self) -> int:
        """What orders judgements: the action, then how much was found; 0 of a good step."""
        return 100 * self.action + len(self.findings)

    @property
    def text(self) -> str:
        """All findings in one line."""
        return "; ".join(finding.message for finding in self.findings)


class StepHealth:
    """Recent losses and gradient norms, counts of bad steps, and the judgement they allow.

    All of it is in checkpoints, so that a resumed run judges as the uninterrupted one.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._phase = ""
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self.counts: dict[str, int] = {}
        """Bad steps of the run by kind, and how many were skipped and repeated."""
        self._skipped_in_a_row = 0

    def enter_phase(self, name: str) -> None:
        """Other solver values, other gradients: what is usual is learned anew."""
        if name != self._phase:
            self._phase = name
            self._losses.clear()
            self._norms.clear()

    def judge(
        self, loss: float, grad_norm: float, statistics: dict[str, Optional[float]], broken: Optional[str], repeats: int
    ) -> Verdict:
        """What this rank thinks of a step.

        Args:
            loss: mean over the global batch.
            grad_norm: global, before clipping.
            statistics: of the solver, by the names in metrics.jsonl.
            broken: the message of a solve whose iterate is not finite.
            repeats: how often the step has been repeated.
        """
        findings = list(self._find(loss, grad_norm, statistics, broken))
        action = Action.ACCEPT
        for finding in findings:
            wanted = _POLICIES[getattr(self._config, finding.kind)]
            if wanted is Action.RETRY and repeats >= self._config.retries:
                wanted = Action.SKIP
            action = max(action, wanted)
        return Verdict(action, tuple(findings))

    def record(self, verdict: Verdict, loss: float, grad_norm: float) -> None:
        """Takes note of what was done; steps whose update was made say what is usual.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        for finding in verdict.findings:
            self._count(finding.kind)
        if verdict.action is Action.RETRY:
            self._count("retried")
        elif verdict.action is Action.SKIP:
            self._count("skipped")
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > self._config.max_skipped:
                raise DivergedError(
                    f"{self._skipped_in_a_row} steps in a row were skipped, more than health.max_skipped="
                    f"{self._config.max_skipped} ({verdict.text}): branch off an earlier checkpoint with a lower "
                    "optimizer.learning_rate (a new run.dir and checkpoint.load)"
                )
        else:
            self._skipped_in_a_row = 0
            self._losses.append(loss)
            self._norms.append(grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {
            "phase": self._phase,
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "counts": dict(self.counts),
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave; nothing for a run that was saved without."""
        if state:
            self._phase = state["phase"]
            self._losses.extend(state["losses"])
            self._norms.extend(state["grad_norms"])
            self.counts = dict(state["counts"])
            self._skipped_in_a_row = state["skipped_in_a_row"]

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def _find(self, loss: float, grad_norm: float, statistics: dict[str, Optional[float]], broken: Optional[str]) -> Iterator[Finding]:
        config = self._config
        if broken:
            yield Finding("nonfinite", broken)
        elif not math.isfinite(loss):
            yield Finding("nonfinite", f"the loss is {loss}")
        elif not math.isfinite(grad_norm):
            yield Finding("nonfinite", f"the gradient norm is {grad_norm}")
        else:
            for name, key, words in (
                ("unconverged_fraction", "unconverged_limit", "share of unconverged samples"),
                ("residual_mean", "residual_limit", "mean residual"),
            ):
                value, limit = statistics.get(name), getattr(config, key)
                if limit is not None and value is not None and value > limit:
                    yield Finding("divergence", f"the {words} {value:.3g} exceeds health.{key}={limit:g}")
            yield from self._spike("gradient_spike", grad_norm, self._norms, config.gradient_spike_sigmas)
            yield from self._spike("loss_spike", loss, self._losses, config.loss_spike_sigmas)

    def _spike(self, kind: str, value: float, recent: deque[float], sigmas: float) -> Iterator[Finding]:
        if not sigmas or len(recent) < self._config.window // 4:
            return
        mean = sum(recent) / len(recent)
        spread = math.sqrt(sum((other - mean) ** 2 for other in recent) / len(recent))
        spread = max(spread, _LEAST_SPREAD * abs(mean))
        if value > mean + sigmas * spread:
            name = "gradient norm" if kind == "gradient_spike" else "loss"
            yield Finding(
                kind, f"the {name} {value:.4g} is {(value - mean) / spread:.1f} sigma above the recent {mean:.4g}"
            )


_LEAST_SPREAD = 0.01
"""Of the mean: a run whose numbers hardly move has no spikes of a percent."""

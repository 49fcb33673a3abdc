"""What all evaluations of F for one microbatch share, bound explicitly around each of them.

Effective weights and the injection u are computed once per microbatch (as in the reference) and used by every
evaluation. They are handed to the layers by a context variable rather than kept on the modules: with two microbatches
in flight, a mutable state on the module gives the recomputation in the backward pass the wrong one, silently.
"""

from __future__ import annotations

import contextlib
import contextvars
from dataclasses import dataclass, field
from typing import Iterator, NamedTuple, Optional, Protocol

from torch import Tensor, nn


class EffectiveWeight(NamedTuple):
    """A rank's assembled weight [rows, ...] and bias [rows]."""

    weight: Tensor
    bias: Optional[Tensor]


class LayerStates(Protocol):
    """Recurrent states and caches of an inference solve, by layer module; see ``inference/states``."""

    @property
    def lengths(self) -> Optional[Tensor]:
        """[b] tokens of this pass that count, by sample; the rest is padding at the end. None: all count."""

    @property
    def counting(self) -> Optional[Tensor]:
        """[b, s] bool, the same by token."""

    def committed(self, layer: nn.Module) -> Optional[tuple[Tensor, ...]]:
        """The layer's state before the tokens of this pass; None at the start of a sequence."""

    def propose(self, layer: nn.Module, state: tuple[Tensor, ...]) -> None:
        """The state after the tokens of this pass, if the pass is accepted."""

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """Keys and values [t, b, m, d] of the committed tokens and, behind them, of this pass [s, b, m, d].

        The third value says which of them each query sees, [b, s, t] bool; None: those up to its own position, the
        queries being at the last s.
        """


@dataclass
class Pass:
    """Everything one microbatch's evaluations of F share."""

    weights: dict[nn.Module, EffectiveWeight] = field(default_factory=dict)
    """Effective weights by the module that owns their parameters."""
    injection: Optional[Tensor] = None
    """u, [s, b, local rows of the injected projection]; None in explicit models."""
    states: Optional[LayerStates] = None
    """States of an inference solve; None when the whole sequence is evaluated at once from its start."""

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Makes this the current pass of the running context (thread or recomputation included)."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: contextvars.ContextVar[Optional[Pass]] = contextvars.ContextVar("megatron_implicit_pass", default=None)


def current_pass() -> Pass:
    """The pass that is bound here.

    Raises:
        RuntimeError: a layer of F was called outside its decoder.
    """
    bound = _CURRENT.get()
    if bound is None:
        raise RuntimeError("a layer was called without a bound Pass: evaluate it through its decoder")
    return bound

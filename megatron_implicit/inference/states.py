"""What layers carry from one chunk of tokens to the next, committed only from an accepted iterate."""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn


class SolveStates:
    """States of all layers: Mamba2's convolution inputs and SSM state, attention's keys and values.

    Every evaluation of F reads the committed states and proposes new ones; a solve evaluates many times, and only what
    its output pass proposed is committed.
    """

    def __init__(self) -> None:
        self._committed: dict[nn.Module, tuple[Tensor, ...]] = {}
        self._proposed: dict[nn.Module, tuple[Tensor, ...]] = {}

    def committed(self, layer: nn.Module) -> Optional[tuple[Tensor, ...]]:
        """The layer's state before the current tokens; None at the start of the sequence."""
        return self._committed.get(layer)

    def propose(self, layer: nn.Module, state: tuple[Tensor, ...]) -> None:
        """The layer's state after the current tokens, should this evaluation be accepted."""
        self._proposed[layer] = state

    def commit(self) -> None:
        """Accepts what the last evaluation proposed."""
        self._committed.update(self._proposed)
        self._proposed.clear()

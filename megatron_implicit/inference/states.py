"""What layers carry from one segment of tokens to the next, committed only from an accepted iterate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from megatron_implicit.errors import CapacityError

Recurrent = tuple[Tensor, ...]


@dataclass
class _Cache:
    """Keys and values of one attention layer, [b, m, capacity + 1, d]; the last slot takes what padding writes."""

    keys: Tensor
    values: Tensor


class _Routes(NamedTuple):
    """How a segment whose samples stand at different positions reaches the cache."""

    rows: Tensor
    """[b, 1]"""
    slots: Tensor
    """[b, s] where each token's key goes."""
    visible: Tensor
    """[b, s, t] which keys each query sees."""


class SolveStates:
    """States of all layers: Mamba2's convolution inputs and SSM state, attention's keys and values.

    Every evaluation of F reads the committed states and proposes new ones; a solve evaluates many times, and only what
    its output pass proposed is committed. Recurrent states have a constant size. Keys and values lie in memory
    allocated once for ``capacity`` tokens a sample; an evaluation writes behind the committed ones, so that committing
    only moves the position. Samples may stand at different positions.

    Args:
        batch: samples.
        capacity: most tokens of a sample that attention can hold; None where no layer has attention.
        device: where the positions are needed.
    """

    def __init__(self, batch: int, capacity: Optional[int], device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.positions: list[int] = [0] * batch
        """Committed tokens by sample."""
        self._committed: dict[nn.Module, Recurrent] = {}
        self._proposed: dict[nn.Module, Recurrent] = {}
        self._caches: dict[nn.Module, _Cache] = {}
        self._lengths: list[int] = []
        self.lengths: Optional[Tensor] = None
        self.counting: Optional[Tensor] = None
        self.start: Optional[int] = 0
        """Position of the segment's first token, where it is the same for all samples."""
        self.places: Optional[Tensor] = None
        """[b, s] positions of the segment's tokens, where it is not."""
        self._end = 0
        self._routes: Optional[_Routes] = None

    # ---------------------------------------------------------------- a segment of tokens

    def begin(self, tokens: int, lengths: Optional[Sequence[int]] = None) -> None:
        """Announces the segment that the next evaluations are about: ``tokens`` a sample, after the committed ones.

        Args:
            tokens: of the segment, padding included.
            lengths: [b] tokens of each sample that count, the rest being padding at the end; None counts all.

        Raises:
            CapacityError: attention's cache does not hold them, in one line.
        """
        self._lengths = [tokens] * len(self.positions) if lengths is None else list(lengths)
        self._proposed.clear()
        ends = [position + length for position, length in zip(self.positions, self._lengths)]
        if self._caches and max(ends) > self.capacity:
            raise CapacityError(needed=max(ends), capacity=self.capacity)
        steps = torch.arange(tokens, device=self.device)
        ragged = any(length < tokens for length in self._lengths)
        self.lengths = torch.tensor(self._lengths, device=self.device) if ragged else None
        self.counting = steps < self.lengths[:, None] if ragged else None
        first, self._end, self._routes = self.positions[0], max(ends), None
        # All at one position, and no padding beyond the end: slices instead of gathers, and no mask.
        together = all(position == first for position in self.positions) and first + tokens == self._end
        self.start = first if together else None
        self.places = None if together else torch.tensor(self.positions, device=self.device)[:, None] + steps

    def commit(self) -> None:
        """Accepts what the last evaluation proposed: its tokens belong to the past now."""
        self._committed.update(self._proposed)
        self._proposed.clear()
        self.positions = [position + length for position, length in zip(self.positions, self._lengths)]

    # ---------------------------------------------------------------- what layers ask for

    def committed(self, layer: nn.Module) -> Optional[Recurrent]:
        """The layer's recurrent state before the current tokens; None at the start of the sequence."""
        return self._committed.get(layer)

    def propose(self, layer: nn.Module, state: Recurrent) -> None:
        """The layer's recurrent state after the current tokens, should this evaluation be accepted."""
        self._proposed[layer] = state

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """Writes k and v [s, b, m, d] behind the committed ones; see ``layers.passes.LayerStates.extend``."""
        cache = self._caches.get(layer) or self._allocate(layer, key)
        if self.start is not None:
            new = slice(self.start, self._end)
            cache.keys[:, :, new], cache.values[:, :, new] = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
            visible = None
        else:
            rows, slots, visible = self._routes or self._find_routes()
            cache.keys[rows, :, slots], cache.values[rows, :, slots] = key.transpose(0, 1), value.transpose(0, 1)
        keys, values = (tensor[:, :, : self._end].permute(2, 0, 1, 3) for tensor in (cache.keys, cache.values))
        return keys, values, visible

    def _find_routes(self) -> _Routes:
        """Once a segment, and only where a layer has attention."""
        slots = self.places if self.counting is None else self.places.masked_fill(~self.counting, self.capacity)
        visible = torch.arange(self._end, device=self.device) <= self.places[:, :, None]
        self._routes = _Routes(torch.arange(len(slots), device=self.device)[:, None], slots, visible)
        return self._routes

    def _allocate(self, layer: nn.Module, key: Tensor) -> _Cache:
        _, b, m, d = key.shape
        if self._end > self.capacity:
            raise CapacityError(needed=self._end, capacity=self.capacity)
        # Zeros: what a padded query sees must be finite.
        cache = _Cache(*(key.new_zeros(b, m, self.capacity + 1, d) for _ in range(2)))
        return self._caches.setdefault(layer, cache)

    # ---------------------------------------------------------------- the batch

    def keep(self, samples: Sequence[int]) -> None:
        """Drops all samples but these; between segments only."""
        index = torch.tensor(samples, dtype=torch.long, device=self.device)
        self.positions = [self.positions[sample] for sample in samples]
        self._committed = {
            layer: tuple(tensor.index_select(0, index) for tensor in state) for layer, state in self._committed.items()
        }
        for cache in self._caches.values():
            cache.keys, cache.values = cache.keys.index_select(0, index), cache.values.index_select(0, index)

    @property
    def nbytes(self) -> int:
        """Memory of the committed states and caches."""
        tensors = [tensor for state in self._committed.values() for tensor in state]
        tensors += [tensor for cache in self._caches.values() for tensor in (cache.keys, cache.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

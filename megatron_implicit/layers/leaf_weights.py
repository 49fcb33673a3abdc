"""Effective weights that several microbatches share, with one backward pass through the weight norm for all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_implicit.layers.passes import EffectiveWeight
from megatron_implicit.layers.weights import weight_owners


class LeafWeights:
    """The effective weights of a module, computed once and handed out as leaves of the autograd graph.

    A pass that computes its own effective weights keeps a copy of all of them until its backward pass. With several
    microbatches in flight that would be a copy each; leaves are shared. Their gradients are summed in float32,
    whatever the weights' precision::

        weights = LeafWeights(decoder)                   once an optimizer step
        decoder.begin(..., weights=weights.bound)        for every microbatch
        ...                                              forward and backward passes, in any order
        weights.backward()                               after the last: gradients reach the parameters
    """

    def __init__(self, module: nn.Module) -> None:
        self._sources: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self.bound: dict[nn.Module, EffectiveWeight] = {}
        """The leaves, as a Pass wants them."""
        for owner in weight_owners(module):
            weight, bias = owner()
            self.bound[owner] = EffectiveWeight(self._leaf(weight), None if bias is None else self._leaf(bias))

    def backward(self) -> None:
        """Carries the summed gradients of the leaves into the parameters; the leaves must not be used afterwards.

        Every rank of the tensor group must call it: the norm of column-sharded weights is reduced over the group.
        """
        used = [(source, grad) for source, grad in zip(self._sources, self._gradients) if grad is not None]
        self._sources, self._gradients, self.bound = [], [], {}
        if used:
            torch.autograd.backward([source for source, _ in used], [grad.to(source.dtype) for source, grad in used])

    def _leaf(self, source: Tensor) -> Tensor:
        leaf = source.detach().requires_grad_(source.requires_grad)
        if source.requires_grad:
            index = len(self._sources)
            self._sources.append(source)
            self._gradients.append(None)
            leaf.register_post_accumulate_grad_hook(lambda leaf: self._collect(index, leaf))
        return leaf

    def _collect(self, index: int, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        summed = self._gradients[index]
        if summed is None:
            self._gradients[index] = gradient.float()
        else:
            summed.add_(gradient)

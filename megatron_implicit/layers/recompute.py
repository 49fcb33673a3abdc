"""Layers whose activations the backward pass recomputes.

Megatron-Core's own ``recompute_granularity='full'`` runs outside our pass binding and MambaStack ignores it. torch's
non-reentrant checkpoint captures the bound pass and enters it again in the backward pass, so that several microbatches
in flight each see their own injection and weights.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch.utils.checkpoint import checkpoint

from megatron_implicit.layers.passes import current_pass

from megatron.core.ssm.mamba_layer import MambaLayer  # isort: skip
from megatron.core.transformer.transformer_layer import TransformerLayer  # isort: skip


def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, evaluated again in the backward pass under the same bound pass."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    bound, names = current_pass(), tuple(kwargs)

    def rebound(*inner: Any) -> Any:
        with bound.bound():
            return function(*inner[: len(args)], **dict(zip(names, inner[len(args) :])))

    # All by position: torch keeps those as saved tensors, which memory accounts see, and keywords in a closure.
    return checkpoint(rebound, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)


class RecomputedMambaLayer(MambaLayer):
    """MambaLayer that keeps only its input."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return recomputed(super().forward, *args, **kwargs)


class RecomputedTransformerLayer(TransformerLayer):
    """TransformerLayer that keeps only its input."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return recomputed(super().forward, *args, **kwargs)

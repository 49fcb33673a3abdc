"""Core attention for Megatron-Core's SelfAttention: torch's scaled_dot_product_attention, with a cache in inference."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn

from megatron_implicit.layers.passes import current_pass
from megatron_implicit.layers.stack_config import StackConfig
from megatron_implicit.ops.attention import attention


class CausalCoreAttention(nn.Module):
    """softmax(q k^T / sqrt d) v over the keys up to each query's position.

    In an inference solve over part of a sequence, the keys and values of the committed tokens come first; those of
    the current tokens are written behind them and count once the accepted iterate is committed.
    """

    def __init__(self, config: StackConfig, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Optional[Tensor] = None, **_: Any
    ) -> Tensor:
        """q [s, b, n, d], k and v [s, b, m, d], rotated already -> [s, b, n * d]. The mask is always causal."""
        states, visible = current_pass().states, None
        if states is not None:
            key, value, visible = states.extend(self, key, value)
        return attention(query, key, value, visible=visible).flatten(-2)

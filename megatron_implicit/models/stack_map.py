"""The map F: one pass through the stack, final norm included."""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from megatron_implicit.layers.norms import RMSNorm
from megatron_implicit.layers.passes import Pass
from megatron_implicit.layers.recompute import recomputed
from megatron_implicit.layers.sharding import Placed
from megatron_implicit.layers.stack_config import StackConfig


class StackMap(Placed, nn.Module):
    """F(z; u) = norm_f(layer_L(... layer_1(z; u) ...; u)), on a float32 residual stream."""

    def __init__(self, config: StackConfig, stack: nn.Module) -> None:
        super().__init__()
        self.config, self.stack = config, stack
        self.final_norm = RMSNorm(config, config.hidden_size, float32_output=True)

    def forward(self, z: Tensor, bound_pass: Pass, rotary_pos_emb: Optional[Tensor] = None) -> Tensor:
        """[s or s/t, b, h] float32 -> the same shape, float32, with the pass bound around every layer."""
        with bound_pass.bound():
            if self.config.recompute == "pass":
                return recomputed(self._evaluate, z, rotary_pos_emb)
            return self._evaluate(z, rotary_pos_emb)

    def _evaluate(self, z: Tensor, rotary_pos_emb: Optional[Tensor]) -> Tensor:
        return self.final_norm(self.stack(hidden_states=z, attention_mask=None, rotary_pos_emb=rotary_pos_emb))

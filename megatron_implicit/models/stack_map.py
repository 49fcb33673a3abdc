"""The map F: one pass through the stack, final norm included; on a pipeline stage, its slice of F."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from megatron_implicit.layers.norms import RMSNorm
from megatron_implicit.layers.passes import Pass
from megatron_implicit.layers.recompute import recomputed
from megatron_implicit.layers.sharding import Placed
from megatron_implicit.layers.stack_config import StackConfig, Stage


class StackMap(Placed, nn.Module):
    """F(z; u) = norm_f(layer_L(... layer_1(z; u) ...; u)), on a float32 residual stream.

    Args:
        config: of the stack.
        stack: Megatron-Core's TransformerBlock or MambaStack with this stage's layers.
        stage: the last one has norm_f.
    """

    def __init__(self, config: StackConfig, stack: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.config, self.stack = config, stack
        self.stack.pre_process = True  # it takes its input as an argument on every stage
        self.final_norm = RMSNorm(config, config.hidden_size, float32_output=True) if stage.is_last else None

    def forward(self, z: Tensor, bound_pass: Pass, rotary_pos_emb: Optional[Tensor] = None) -> Tensor:
        """[s or s/t, b, h] float32 -> the same shape, float32, with the pass bound around every layer."""
        if z.requires_grad and not torch.is_grad_enabled():
            z = z.detach()  # layers add their residual with gradients enabled, whatever holds around them
        with bound_pass.bound():
            if self.config.recompute == "pass":
                return recomputed(self._evaluate, z, rotary_pos_emb)
            return self._evaluate(z, rotary_pos_emb)

    def _evaluate(self, z: Tensor, rotary_pos_emb: Optional[Tensor]) -> Tensor:
        z = self.stack(hidden_states=z, attention_mask=None, rotary_pos_emb=rotary_pos_emb)
        return z if self.final_norm is None else self.final_norm(z)

"""The residual stream, kept in float32 under bf16 parameters."""

from __future__ import annotations

from typing import Callable, Optional

import torch.nn.functional as F
from torch import Tensor

ResidualAdd = Callable[[tuple[Tensor, Optional[Tensor]], Tensor, float], Tensor]


def residual_add(training: bool, fused: bool = False) -> ResidualAdd:
    """In the place of Megatron-Core's bias_dropout_add, which rounds the residual to the dtype of the branch: in bf16 the
    stream, and with it the residual of a solve, would be known to three digits only.

    Args:
        training: whether dropout is on.
        fused: asked for by Megatron-Core's layers; there is no fused kernel.

    Returns:
        ((branch, bias), residual [s, b, h] float32, dropout probability) -> [s, b, h] float32.
    """

    def add(branch: tuple[Tensor, Optional[Tensor]], residual: Tensor, probability: float) -> Tensor:
        value, bias = branch
        if bias is not None:
            value = value + bias
        return residual + F.dropout(value, probability, training)

    return add

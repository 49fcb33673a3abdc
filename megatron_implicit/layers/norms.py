"""RMSNorm in the forms Megatron-Core's layers build, and the gated group norm of the Mamba2 mixer."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_implicit.comm.partition import partition
from megatron_implicit.comm.reductions import sum_over
from megatron_implicit.layers.sharding import Placed, Placement
from megatron_implicit.layers.stack_config import StackConfig
from megatron_implicit.layers.weights import mark_sharded
from megatron_implicit.ops.norms import gated_rms_norm, rms_norm

from megatron.core import parallel_state  # isort: skip


class RMSNorm(Placed, nn.Module):
    """x * rsqrt(mean x^2 + eps) * weight, statistics and weight in float32, output in the parameters' dtype.

    The residual stream is float32 and what follows is a matrix product in ``config.params_dtype``. The final norm of F
    (``float32_output``) gives the next iterate, which stays float32. Works under sequence parallelism, which
    Megatron-Core's torch norm refuses.
    """

    def __init__(
        self, config: StackConfig, hidden_size: int, eps: float | None = None, float32_output: bool = False, **_: Any
    ) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.out_dtype = torch.float32 if float32_output else config.params_dtype
        self.tp_group = parallel_state.get_tensor_model_parallel_group()  # Megatron-Core builds norms without groups
        self.weight = Parameter(torch.empty(hidden_size))
        # Each rank norms its own tokens: Megatron-Core sums these gradients over the tensor group.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        return rms_norm(x, self.weight, self.eps, out_dtype=self.out_dtype)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Ones."""
        self.weight.fill_(1.0)


class GatedGroupRMSNorm(Placed, nn.Module):
    """weight * rms(y * silu(gate)) by group of channels; the paper's one group may span the tensor group."""

    def __init__(self, config: StackConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.tp_group = config.layernorm_epsilon, group
        self.partition = partition(config.mamba_inner_size, group.size(), group.rank())
        self.group_size = config.mamba_inner_size // config.mamba_num_groups
        self.spans_ranks = config.mamba_num_groups < group.size()
        self.weight = Parameter(torch.empty(self.partition.size))
        mark_sharded(self.weight, 0)

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """[..., local channels] twice -> the same shape, float32."""
        reduce = functools.partial(sum_over, group=self.tp_group) if self.spans_ranks else None
        return gated_rms_norm(y, gate, self.weight, group_size=self.group_size, eps=self.eps, reduce=reduce)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Ones."""
        self.weight.fill_(1.0)

    def placement(self, name: str) -> Placement:
        """Channels of the inner width."""
        return Placement(0, self.partition)

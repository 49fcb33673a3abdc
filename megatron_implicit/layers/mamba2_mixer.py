"""The Mamba2 mixer for Megatron-Core's MambaLayer, with the injection and one group under tensor parallelism.

A module of its own rather than a subclass of MambaMixer, which asserts that groups divide over the tensor group,
imports Triton unconditionally, and keeps in_proj as one matrix whose B and C rows could not be replicated. Equations:
arXiv 2405.21060 (Mamba2), section 7, as the reference implementation orders them.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_implicit.comm.partition import partition
from megatron_implicit.layers.linear import ColumnShardedLinear, SectionedLinear
from megatron_implicit.layers.norms import GatedGroupRMSNorm
from megatron_implicit.layers.passes import current_pass
from megatron_implicit.layers.sections import projection
from megatron_implicit.layers.sharding import Placed, Placement
from megatron_implicit.layers.stack_config import StackConfig
from megatron_implicit.layers.weights import SectionedWeight, mark_sharded
from megatron_implicit.ops.causal_conv import causal_conv1d
from megatron_implicit.ops.precision import compute_dtype
from megatron_implicit.ops.ssd import ssd_scan

HEAD_PARAMETERS = ("dt_bias", "A_log", "D")
"""One number a head, in float32 whatever the precision of the matrices."""
_A_RANGE, _DT_RANGE = (1.0, 16.0), (1e-3, 1e-1)


class Mamba2Mixer(Placed, nn.Module):
    """[z, x, B, C, dt] = in_proj(h) + u; causal conv of [x, B, C]; SSD scan; gated norm; out_proj.

    Args:
        config: dimensions of the stack.
        d_model: width h.
        pg_collection: process groups; ``tp`` is used.
    """

    def __init__(self, config: StackConfig, d_model: int, pg_collection: Any = None, **unused: Any) -> None:
        super().__init__()
        group = pg_collection.tp
        self.config, self.tp_group = config, group
        ranks = group.size()
        self.heads = config.mamba_num_heads // ranks
        self.inner = self.heads * config.mamba_head_dim
        self.groups = max(config.mamba_num_groups // ranks, 1)
        self.in_proj = SectionedLinear(
            d_model, None, config=config, projection="mamba_in", injected=config.implicit, tp_group=group
        )
        self.conv1d = SectionedWeight(
            projection("mamba_conv", config), (1, config.conv_width), config, group, bias=True
        )
        self.norm = GatedGroupRMSNorm(config, group)
        self.out_proj = ColumnShardedLinear(config.mamba_inner_size, d_model, config=config, tp_group=group)
        self.head_partition = partition(config.mamba_num_heads, ranks, group.rank())
        for name in HEAD_PARAMETERS:
            self.register_parameter(name, Parameter(torch.empty(self.heads)))
            mark_sharded(getattr(self, name), 0)

    def forward(
        self, hidden_states: Tensor, inference_context: Any = None, packed_seq_params: Any = None
    ) -> tuple[Tensor, Optional[Tensor]]:
        """[s or s/t, b, h] -> ([s or s/t, b, h], None)."""
        projected, _ = self.in_proj(hidden_states)
        bc = self.groups * self.config.mamba_state_dim
        z, xbc, dt = projected.transpose(0, 1).split([self.inner, self.inner + 2 * bc, self.heads], dim=-1)
        conv_state, ssm_state = self._committed_states()
        states, effective = current_pass().states, self.conv1d.bound()
        xbc, conv_state = causal_conv1d(
            xbc, effective.weight.squeeze(1), effective.bias, state=conv_state,
            lengths=states.lengths if states is not None else None,
        )  # fmt: skip
        x, B, C = xbc.split([self.inner, bc, bc], dim=-1)
        dt = F.softplus(dt.to(compute_dtype(dt)) + self.dt_bias)
        if states is not None and states.counting is not None:
            dt = dt * states.counting.unsqueeze(-1)  # a step of no length neither decays nor enters the state
        y, ssm_state = ssd_scan(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            self.D,
            chunk_size=self.config.scan_chunk_size,
            initial_state=ssm_state,
        )
        self._propose_states(conv_state, ssm_state)
        gated = self.norm(y.flatten(-2), z).to(hidden_states.dtype)
        return self.out_proj(gated.transpose(0, 1).contiguous())

    def _committed_states(self) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """([b, channels, taps - 1], [b, heads, head dim, state size]) before the tokens of this pass."""
        states = current_pass().states
        committed = states.committed(self) if states is not None else None
        return committed if committed is not None else (None, None)

    def _propose_states(self, *state: Tensor) -> None:
        states = current_pass().states
        if states is not None:
            states.propose(self, state)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """A ~ U(1, 16); dt ~ log-uniform(1e-3, 1e-1) through the inverse of softplus; D = 1 (Mamba2's defaults)."""
        heads, mine = self.head_partition.logical, slice(self.head_partition.start, self.head_partition.stop)
        rates = torch.empty(heads).uniform_(*_A_RANGE, generator=generator)
        logs = torch.empty(heads).uniform_(math.log(_DT_RANGE[0]), math.log(_DT_RANGE[1]), generator=generator)
        dt = logs.exp().clamp(min=1e-4)
        self.A_log.copy_(rates.log()[mine])
        self.dt_bias.copy_((dt + torch.log(-torch.expm1(-dt)))[mine])
        self.D.fill_(1.0)

    def placement(self, name: str) -> Placement:
        """One entry a head."""
        return Placement(0, self.head_partition)

"""Megatron-Core's column- and row-parallel linears with sectioned, possibly weight-normed weights."""

from __future__ import annotations

from typing import Any, Optional

import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.comm.partition import partition
from megatron_implicit.layers.passes import current_pass
from megatron_implicit.layers.sections import Projection, ProjectionName, injection_projection, projection
from megatron_implicit.layers.stack_config import StackConfig
from megatron_implicit.layers.weights import ColumnShardedWeight, SectionedWeight

from megatron.core.tensor_parallel.layers import (  # isort: skip
    ColumnParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (  # isort: skip
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


class SectionedLinear(ColumnParallelLinear):
    """A column-parallel linear whose rows are the sections of a projection; adds the injection where asked to.

    Args:
        input_size: width of the input, h.
        output_size: ignored: the projection knows its rows, padding included.
        projection: name of the projection, or the projection itself.
        injected: add the pass's u, sharded exactly as this output is, so without communication.
    """

    def __init__(
        self,
        input_size: int,
        output_size: Optional[int],
        *,
        config: StackConfig,
        projection: ProjectionName | Projection,
        injected: bool = False,
        bias: bool = False,
        tp_group: Optional[dist.ProcessGroup] = None,
        **unused: Any,
    ) -> None:
        layout = _named(projection, config)
        super().__init__(
            input_size,
            layout.local_rows(tp_group.size()) * tp_group.size(),
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=tp_group,
        )
        self.injected = injected
        self.rows = SectionedWeight(layout, (input_size,), config, tp_group, bias=bias)

    def forward(self, x: Tensor, weight: Optional[Tensor] = None, runtime_gather_output: Optional[bool] = None):
        """[s, b, input_size] -> ([s, b, local rows], None)."""
        effective = self.rows.bound()
        y, _ = super().forward(x, weight=effective.weight)
        if effective.bias is not None:
            y = y + effective.bias
        if self.injected:
            y = y + current_pass().injection
        return y, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One key a section: ``<prefix>z.weight_v``."""
        return self.rows.sharded_state_dict(prefix, sharded_offsets, metadata)


def _named(choice: ProjectionName | Projection, config: StackConfig) -> Projection:
    return projection(choice, config) if isinstance(choice, str) else choice


class InjectionLinear(SectionedLinear):
    """u = W_inj · RMSNorm(e) + b, with the rows of the projection that u is added to."""

    def __init__(self, config: StackConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__(
            config.hidden_size, None, config=config, projection=injection_projection(config), bias=True,
            tp_group=tp_group,
        )  # fmt: skip


class ColumnShardedLinear(nn.Module):
    """Megatron-Core's row-parallel linear (input columns sharded, outputs summed) with an effective weight.

    RowParallelLinear itself always allocates a parameter and takes no weight in its forward.

    Args:
        input_size: computed width over all ranks.
        output_size: width h of the output.
        logical_input_size: width as checkpoints store it; None if the input is not padded.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: StackConfig, tp_group: dist.ProcessGroup, **unused: Any
    ) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        padded = bool(config.logical_ffn_size) and input_size == config.ffn_hidden_size
        logical = config.logical_ffn_size if padded else input_size
        columns = partition(logical, tp_group.size(), tp_group.rank(), align=padded)
        self.columns = ColumnShardedWeight(output_size, columns, config, tp_group, gain=_residual_gain(config))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[s, b, local columns] -> ([s or s/t, b, output_size], None)."""
        partial = linear_with_grad_accumulation_and_async_allreduce(
            input=x,
            weight=self.columns.bound().weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """``<prefix>weight_v`` (or ``weight``) and ``<prefix>weight_g``."""
        return self.columns.sharded_state_dict(prefix, sharded_offsets, metadata)


def _residual_gain(config: StackConfig) -> float:
    """1/sqrt(residual branches) on the matrices that write to the residual stream, in explicit models only.

    The reference means to do so in implicit models too, but its weight norm renames the parameter first and the
    scaling silently never happens; torch's default is what the paper's implicit models were trained with.
    """
    if config.implicit:
        return 1.0
    return ((1 + config.mlps_per_layer) * config.num_layers) ** -0.5

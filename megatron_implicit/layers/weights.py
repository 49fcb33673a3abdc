"""Parameters of a projection and the effective weights they stand for: plain, or normed by rows.

Implicit models norm the rows of every linear and convolution: W = v * g / ||v|| (Salimans & Kingma 2016, as
torch.nn.utils.weight_norm), explicit models use W itself. The parameters are always the *logical* slice a rank owns;
zero rows or columns that make the computed slices equal are appended when the weight is assembled.
"""

from __future__ import annotations

import functools
import math
from typing import Iterator, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_implicit.comm.partition import Partition
from megatron_implicit.comm.reductions import shared_by, sum_over
from megatron_implicit.layers.passes import EffectiveWeight, current_pass
from megatron_implicit.layers.sections import Division, Projection, Section
from megatron_implicit.layers.sharding import Placed, Placement
from megatron_implicit.layers.stack_config import StackConfig
from megatron_implicit.ops.weight_norm import weight_norm


class WeightOwner(nn.Module):
    """A module whose forward assembles a rank's effective weight; evaluated once per microbatch and bound to a Pass.

    Assembly goes through ``__call__`` so that hooks on the parameters' module (the distributed optimizer's parameter
    gather) fire.
    """

    def forward(self) -> EffectiveWeight:
        raise NotImplementedError

    def bound(self) -> EffectiveWeight:
        """The effective weight of the current pass."""
        return current_pass().weights[self]


def weight_owners(module: nn.Module) -> Iterator[WeightOwner]:
    """All weight owners below ``module``, in a fixed order."""
    return (child for child in module.modules() if isinstance(child, WeightOwner))


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fills ``tensor`` from U(-bound, bound)."""
    tensor.uniform_(-bound, bound, generator=generator)


class RowSection(Placed, nn.Module):
    """The rows of one section that this rank owns, with their gains and biases.

    Args:
        section: rows over all ranks and how they are divided.
        columns: shape of one row, for example (h,) of a linear or (1, taps) of a depthwise convolution.
        normed: v and g instead of W.
        bias: whether each row has a bias.
        group: the tensor group.
    """

    def __init__(
        self, section: Section, columns: tuple[int, ...], *, normed: bool, bias: bool, group: dist.ProcessGroup,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.columns, self.normed, self.tp_group = columns, normed, group
        self.replicated = section.division is Division.REPLICATED
        self.partition: Partition = section.partition(group.size(), group.rank())
        rows = self.partition.size
        matrix = Parameter(torch.empty(rows, *columns, dtype=dtype))
        self.register_parameter("weight_v" if normed else "weight", matrix)
        self.weight_g = Parameter(torch.empty(rows)) if normed else None
        self.bias = Parameter(torch.empty(rows)) if bias else None
        if not self.replicated:
            for parameter in self.parameters():
                mark_sharded(parameter, 0)

    @property
    def matrix(self) -> Parameter:
        """v of a normed section, W of a plain one: [rows, *columns]."""
        return self.weight_v if self.normed else self.weight

    def forward(self) -> EffectiveWeight:
        """The section's effective rows, padded to the computed number."""
        share = functools.partial(shared_by, group=self.tp_group) if self.replicated else lambda value: value
        weight = share(self.matrix)
        if self.normed:
            weight = weight_norm(weight, share(self.weight_g))
        bias = share(self.bias).to(weight.dtype) if self.bias is not None else None
        missing = self.partition.padding
        if missing:
            weight = F.pad(weight, (0, 0) * len(self.columns) + (0, missing))
            bias = F.pad(bias, (0, missing)) if bias is not None else None
        return EffectiveWeight(weight, bias)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, gain: float = 1.0) -> None:
        """torch's default initialisation of a linear or convolution, drawn for the whole section on every rank.

        kaiming_uniform(a=sqrt 5) is U(-1, 1) / sqrt(fan in); ``gain`` scales the weight.
        """
        bound = 1.0 / math.sqrt(math.prod(self.columns))
        for parameter, scale in ((self.matrix, gain), (self.bias, 1.0)):
            if parameter is not None:
                whole = torch.empty(self.partition.logical, *parameter.shape[1:])
                uniform_(whole, bound * scale, generator)
                parameter.copy_(whole[self.partition.start : self.partition.stop])
        self.reset_gain()

    @torch.no_grad()
    def reset_gain(self) -> None:
        """g <- ||v||, so that W = v."""
        if self.normed:
            self.weight_g.copy_(self.weight_v.float().flatten(1).norm(dim=1))

    def placement(self, name: str) -> Optional[Placement]:
        """Rows of the section, unless they are replicated."""
        return None if self.replicated else Placement(0, self.partition)


class SectionedWeight(WeightOwner):
    """All sections of a projection, assembled into the rows a rank computes with."""

    def __init__(
        self, projection: Projection, columns: tuple[int, ...], config: StackConfig, group: dist.ProcessGroup,
        *, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.join = projection.join
        self.sections = nn.ModuleDict(
            {
                section.name: RowSection(
                    section, columns, normed=config.implicit, bias=bias, group=group, dtype=config.params_dtype
                )
                for section in projection.sections
            }
        )

    def forward(self) -> EffectiveWeight:
        """[local rows, *columns] and [local rows]."""
        weights, biases = zip(*(section() for section in self.sections.values()))
        return EffectiveWeight(self.join(weights), self.join(biases) if biases[0] is not None else None)

    def initialise(self, generator: torch.Generator) -> None:
        """Initialises every section, in order."""
        for section in self.sections.values():
            section.initialise(generator)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The sections' shards, without this module's own level in their keys."""
        shards: dict = {}
        for name, section in self.sections.items():
            shards.update(section.sharded_state_dict(f"{prefix}{name}.", (), metadata))
        return shards


class ColumnShardedWeight(Placed, WeightOwner):
    """The weight of a row-parallel linear: each rank owns a slice of the input columns; gains are replicated.

    ||v||^2 of a row is spread over the ranks, so it is summed forward and backward, and g, whose use is spread too,
    has its gradient summed.
    """

    def __init__(
        self, rows: int, columns: Partition, config: StackConfig, group: dist.ProcessGroup, *, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.columns, self.normed, self.tp_group, self.gain = columns, config.implicit, group, gain
        matrix = Parameter(torch.empty(rows, columns.size, dtype=config.params_dtype))
        self.register_parameter("weight_v" if self.normed else "weight", matrix)
        self.weight_g = Parameter(torch.empty(rows)) if self.normed else None
        mark_sharded(matrix, 1)

    @property
    def matrix(self) -> Parameter:
        """v of a normed weight, W of a plain one: [rows, local columns]."""
        return self.weight_v if self.normed else self.weight

    def forward(self) -> EffectiveWeight:
        """[rows, computed local columns]."""
        weight = self.matrix
        if self.normed:
            reduce = functools.partial(sum_over, group=self.tp_group)
            weight = weight_norm(weight, shared_by(self.weight_g, self.tp_group), reduce=reduce)
        if self.columns.padding:
            weight = F.pad(weight, (0, self.columns.padding))
        return EffectiveWeight(weight, None)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """As RowSection.initialise, for the whole matrix."""
        whole = torch.empty(self.matrix.shape[0], self.columns.logical)
        uniform_(whole, self.gain / math.sqrt(self.columns.logical), generator)
        self.matrix.copy_(whole[:, self.columns.start : self.columns.stop])
        if self.normed:  # g = ||v||, which every rank knows: parameters are still on the host, where NCCL sums nothing
            self.weight_g.copy_(whole.to(self.matrix.dtype).float().square().sum(dim=1).sqrt())

    def placement(self, name: str) -> Optional[Placement]:
        """Columns of v (or W); g is replicated."""
        return None if name == "weight_g" else Placement(1, self.columns)


def mark_sharded(parameter: Parameter, axis: int) -> None:
    """Megatron-Core's attributes: this parameter is a shard, so every rank's part counts in the gradient norm."""
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    set_tensor_model_parallel_attributes(parameter, True, axis, 1)

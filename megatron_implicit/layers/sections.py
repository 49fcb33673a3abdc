"""The named parts of a projection, how they are divided over the tensor group, and how a rank puts them together.

A projection like in_proj is one matrix in the reference but five things: z, x, B, C and dt. Keeping them apart makes
every shard a plain slice of rows: checkpoints need nothing but axis-0 shards, reference keys map by row ranges, and
the one group of B and C can be replicated while the rest is divided.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Callable, Literal, Sequence

import torch
from torch import Tensor

from megatron_implicit.comm.partition import Partition, partition
from megatron_implicit.layers.stack_config import StackConfig

ProjectionName = Literal["qkv", "gated_mlp", "mamba_in", "mamba_conv"]


class Division(enum.Enum):
    """How the rows of a section are spread over the tensor group."""

    ROWS = "rows"
    """Each rank owns a contiguous slice of rows."""
    REPLICATED = "replicated"
    """Each rank owns all rows; every rank's use adds to the gradient, which is summed over the group."""


@dataclass(frozen=True)
class Section:
    """A named block of output rows."""

    name: str
    rows: int
    """Rows of the whole section, over all ranks."""
    division: Division = Division.ROWS
    align: bool = False
    """Rows need not divide evenly: computed slices are padded with zero rows."""

    def partition(self, ranks: int, rank: int) -> Partition:
        """The slice of rows a rank owns."""
        if self.division is Division.REPLICATED:
            return Partition(self.rows, 1, 0, self.rows)
        return partition(self.rows, ranks, rank, align=self.align)


Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Projection:
    """Sections in the reference's order, and the assembly of a rank's rows."""

    sections: tuple[Section, ...]
    join: Join = torch.cat

    def local_rows(self, ranks: int) -> int:
        """Rows of the assembled local weight."""
        return sum(section.partition(ranks, 0).computed for section in self.sections)


def projection(name: ProjectionName, config: StackConfig) -> Projection:
    """The sections of a projection for a model configuration."""
    return _PROJECTIONS[name](config)


def _qkv(config: StackConfig) -> Projection:
    """Query, key and value rows; SelfAttention expects them interleaved by key/value head: [q.., k, v] a group."""
    head, groups = config.kv_channels, config.num_query_groups
    queries = config.num_attention_heads // groups

    def interleave(parts: Sequence[Tensor]) -> Tensor:
        q, k, v = parts
        grouped = (q.unflatten(0, (-1, queries * head)), k.unflatten(0, (-1, head)), v.unflatten(0, (-1, head)))
        return torch.cat(grouped, dim=1).flatten(0, 1)

    rows = groups * head
    return Projection((Section("q", queries * rows), Section("k", rows), Section("v", rows)), interleave)


def _gated_mlp(config: StackConfig) -> Projection:
    width = config.logical_ffn_size
    return Projection((Section("w1", width, align=True), Section("w3", width, align=True)))


def _grouped(config: StackConfig) -> tuple[Section, Section]:
    """B and C: divided by groups, or replicated where the one group spans the tensor group."""
    rows = config.mamba_num_groups * config.mamba_state_dim
    spans = config.mamba_num_groups < config.tensor_model_parallel_size
    division = Division.REPLICATED if spans else Division.ROWS
    return Section("B", rows, division), Section("C", rows, division)


def _mamba_in(config: StackConfig) -> Projection:
    inner = config.mamba_inner_size
    return Projection(
        (Section("z", inner), Section("x", inner), *_grouped(config), Section("dt", config.mamba_num_heads))
    )


def _mamba_conv(config: StackConfig) -> Projection:
    return Projection((Section("x", config.mamba_inner_size), *_grouped(config)))


_PROJECTIONS: dict[str, Callable[[StackConfig], Projection]] = {
    "qkv": _qkv, "gated_mlp": _gated_mlp, "mamba_in": _mamba_in, "mamba_conv": _mamba_conv,
}  # fmt: skip


def injection_projection(config: StackConfig) -> Projection:
    """The projection u is added to: in_proj of Mamba2, linear_qkv of Llama."""
    return projection("mamba_in" if config.mamba_num_heads else "qkv", config)

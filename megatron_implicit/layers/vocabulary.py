"""Token embedding and output head, tied or not, over a vocabulary that need not divide by the tensor group.

Each rank stores only its logical rows; the head appends zero rows where slices must be equal, and sets the logits of
those rows to -inf, so that they are outside the softmax and get exactly no gradient.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_implicit.comm.partition import Partition, partition
from megatron_implicit.layers.sharding import Placed, Placement
from megatron_implicit.layers.stack_config import StackConfig
from megatron_implicit.layers.weights import mark_sharded

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding  # isort: skip


def vocabulary_partition(config: StackConfig, group: dist.ProcessGroup) -> Partition:
    """This rank's rows of the vocabulary."""
    return partition(config.vocab_size, group.size(), group.rank(), align=True)


EMBEDDING, HEAD = "embedding.word_embeddings", "output_layer"
"""Names of the two modules in a model."""


class VocabularyEmbedding(Placed, VocabParallelEmbedding):
    """Megatron-Core's vocabulary-parallel embedding with a logical number of rows."""

    def __init__(self, config: StackConfig, tp_group: dist.ProcessGroup) -> None:
        rows = vocabulary_partition(config, tp_group)
        super().__init__(
            rows.computed * rows.ranks, config.hidden_size, init_method=config.init_method, config=config,
            reduce_scatter_embeddings=config.sequence_parallel, tp_group=tp_group,
        )  # fmt: skip
        self.partition, self.init_std = rows, config.embedding_init_std
        self.vocab_end_index = rows.stop
        self.weight = Parameter(torch.empty(rows.size, config.hidden_size, dtype=config.params_dtype))
        mark_sharded(self.weight, 0)

    def initialise(self, generator: torch.Generator) -> None:
        """N(0, embedding_init_std), drawn for the whole vocabulary on every rank."""
        _draw_rows(self.weight, self.partition, self.init_std, generator)

    def placement(self, name: str) -> Placement:
        """Rows of the logical vocabulary."""
        return Placement(0, self.partition)


@torch.no_grad()
def _draw_rows(weight: Parameter, rows: Partition, std: float, generator: torch.Generator) -> None:
    whole = torch.empty(rows.logical, weight.shape[1]).normal_(0, std, generator=generator)
    weight.copy_(whole[rows.start : rows.stop])


class VocabularyHead(Placed, ColumnParallelLinear):
    """logits = z · W^T, without bias and without a norm of its own; W is the embedding, or untied a weight of its own.

    Args:
        config: of the stack.
        tp_group: the tensor group.
        own_copy: if tied, hold a copy of the embedding's rows: the embedding itself is on another pipeline stage.
    """

    def __init__(self, config: StackConfig, tp_group: dist.ProcessGroup, own_copy: bool) -> None:
        rows = vocabulary_partition(config, tp_group)
        super().__init__(
            config.hidden_size, rows.computed * rows.ranks, config=config, init_method=config.init_method,
            bias=False, skip_weight_param_allocation=True, tp_group=tp_group,
        )  # fmt: skip
        self.partition, self.dtype, self.init_std = rows, config.params_dtype, config.embedding_init_std
        self.tied = config.tie_embeddings
        self.drawn_as = EMBEDDING if self.tied else HEAD  # a copy is initialised with the same numbers
        if self.tied and own_copy:
            self.copy_number = 1
        if own_copy or not self.tied:
            self.weight = Parameter(torch.empty(rows.size, config.hidden_size, dtype=config.params_dtype))
            mark_sharded(self.weight, 0)

    def forward(self, hidden: Tensor, weight: Optional[Tensor] = None, runtime_gather_output: Optional[bool] = None):
        """[s or s/t, b, h] and, if tied, the embedding's local rows -> ([s, b, computed local rows], None)."""
        weight = weight if self.tied else self.weight
        padding = self.partition.padding
        padded = F.pad(weight, (0, 0, 0, padding)) if padding else weight
        logits, _ = super().forward(hidden.to(self.dtype), weight=padded, runtime_gather_output=False)
        return (_HidePaddedLogits.apply(logits, padding) if padding else logits), None

    def initialise(self, generator: torch.Generator) -> None:
        """As the embedding."""
        if self.weight is not None:
            _draw_rows(self.weight, self.partition, self.init_std, generator)

    def placement(self, name: str) -> Placement:
        """Rows of the logical vocabulary."""
        return Placement(0, self.partition)


class _HidePaddedLogits(torch.autograd.Function):
    """Sets the last ``padding`` logits to -inf in place. Their softmax is exactly 0, and so is what comes back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, padding: int) -> Tensor:
        logits[..., -padding:] = float("-inf")
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

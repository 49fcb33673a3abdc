"""Which tensors the model of a configuration has, by the reference's names and by the keys of our checkpoints.

Both are asked of the model itself, built on the meta device: no mapping is written down a second time, and no weight
needs memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from megatron_implicit.comm.groups import Place, start_model_parallel, start_process_group
from megatron_implicit.config import Config
from megatron_implicit.conversion.reference import reference_shape, reference_slots
from megatron_implicit.conversion.stored import on_one_process
from megatron_implicit.models import build_model


@dataclass(frozen=True)
class CheckpointSlice:
    """A tensor of our checkpoints as rows of a tensor of the reference."""

    key: str
    """Name in our checkpoints."""
    name: str
    """The reference's name."""
    rows: Optional[slice]
    """Rows of the reference's tensor; None means all."""
    shape: tuple[int, ...]
    """Shape in our checkpoints."""


@dataclass(frozen=True)
class ModelLayout:
    """Every parameter of a model, once."""

    slices: list[CheckpointSlice]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors, by the reference's names."""
        rows: dict[str, int] = {}
        for part in self.slices:
            rows[part.name] = max(rows.get(part.name, 0), part.rows.stop if part.rows else part.shape[0])
        columns = {part.name: part.shape[1:] for part in self.slices}
        return {name: reference_shape(name, (count, *columns[name])) for name, count in rows.items()}


def model_layout(config: Config) -> ModelLayout:
    """The parameters of a configuration's model. This process must be a job of its own."""
    alone = on_one_process(config)
    start_process_group(Place())
    with torch.random.fork_rng(devices=[]):
        start_model_parallel(alone.parallel)
        with torch.device("meta"):
            model = build_model(alone, initialise=False)
    shards = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    keys = {id(shard.data): shard.key for shard in shards.values() if hasattr(shard, "data")}
    return ModelLayout(
        [
            CheckpointSlice(keys[id(slot.parameter)], slot.key, slot.rows, tuple(slot.parameter.shape))
            for slot in reference_slots(model)
        ]
    )

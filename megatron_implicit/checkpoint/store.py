"""What a checkpoint holds, and loading it through Megatron-Core's dist_checkpointing on any tensor x pipeline x data
layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist
from torch import nn

from megatron_implicit.checkpoint.integrity import verify_manifest
from megatron_implicit.checkpoint.random_state import random_state, restore_random_state
from megatron_implicit.checkpoint.streaming import refuse_unsafe_pickles
from megatron_implicit.errors import CheckpointError

from megatron.core import dist_checkpointing, parallel_state  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip
from megatron.core.dist_checkpointing.validation import StrictHandling  # isort: skip


@dataclass
class TrainingState:
    """What besides tensors defines where a run stands; JSON, the same on all ranks."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences read, over all replicas."""
    consumed_tokens: int = 0
    """Tokens of those."""
    run_id: str = ""
    """The same in all jobs of the run."""
    attempt: int = 0
    """Jobs that have worked on the run, this one included; counted from 0."""
    layout: list[int] = field(default_factory=list)
    """Processes, tensor and pipeline size of the job that saved it."""
    data_fingerprint: str = ""
    """Of dataset and tokenizer."""
    parent: Optional[str] = None
    """Checkpoint the run branched off."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """State of each callback, by its name."""
    weights_only: bool = False
    """The checkpoint came from a conversion: a run starts from its weights, with everything else new."""
    health: dict[str, Any] = field(default_factory=dict)
    """What ``StepHealth`` remembers."""


def load_training_state(
    step_folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, *, same_layout: bool
) -> None:
    """Fills model, optimizer, scheduler and, on the same layout, every rank's random generators.

    The caller has made sure that the checkpoint is whole (``integrity``).

    Raises:
        CheckpointError: it holds another model.
    """
    shards = training_shards(model, optimizer, loading=True)
    if not same_layout:
        del shards["random"]  # one a rank: other ranks, other generators; the current seeds stay
    loaded = _load(shards, step_folder)
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        restore_random_state(loaded["random"])


def load_model_weights(model: nn.Module, step_folder: Path) -> None:
    """Fills the model only.

    Raises:
        CheckpointError: the checkpoint is damaged, unsafe, or holds another model.
    """
    verify_manifest(step_folder)
    refuse_unsafe_pickles(step_folder)
    _load({"model": model.sharded_state_dict(metadata=_metadata())}, step_folder)


def _load(shards: dict[str, Any], step_folder: Path) -> dict[str, Any]:
    """Loads into ``shards``; the model's parameters are filled where they are.

    Megatron-Core reads into the tensors it is given. Were it ever to return others, the model would keep whatever its
    memory held, so that is checked.
    """
    targets = {key: shard.data.data_ptr() for key, shard in shards["model"].items() if hasattr(shard, "data")}
    try:
        loaded = dist_checkpointing.load(
            shards, str(step_folder), strict=StrictHandling.RAISE_UNEXPECTED, validate_access_integrity=True
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # Megatron-Core and torch raise many kinds for a checkpoint that does not fit
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{step_folder} does not fit this model ({reason}): check model.* against its config.yaml"
        ) from error
    moved = [key for key, address in targets.items() if loaded["model"][key].data_ptr() != address]
    if moved:
        raise RuntimeError(f"dist_checkpointing did not load in place: {', '.join(moved[:3])}")
    return loaded


def _metadata() -> dict[str, Any]:
    """How Megatron-Core writes shards: one key a layer, and optimizer state that any layout can read."""
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def training_shards(model: nn.Module, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """What a checkpoint holds of a rank's model, optimizer and random generators."""
    metadata = _metadata()
    shards: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
    shards["optimizer"] = optimizer.sharded_state_dict(shards["model"], is_loading=loading, metadata=metadata)
    rank, world = dist.get_rank(), dist.get_world_size()
    shards["random"] = ShardedObject("random", None if loading else random_state(), (world,), (rank,))
    return shards

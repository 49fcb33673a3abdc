"""Starts torch.distributed and Megatron-Core's parallel state, and takes them down again."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_implicit.config import ParallelConfig
from megatron_implicit.device import current_platform, prepare_megatron


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job, as its launcher says."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place_from_environment() -> Place:
    """The place torchrun gives through RANK, WORLD_SIZE and LOCAL_RANK; a single process without them."""
    environment = os.environ
    return Place(
        int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)), int(environment.get("LOCAL_RANK", 0))
    )


def start_process_group(place: Place, timeout_minutes: float = 10.0) -> None:
    """Joins the job's process group; a job of one process needs no address. Does nothing if already joined."""
    if dist.is_initialized():
        return
    platform = current_platform()
    platform.use(place.local_rank)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if place.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(platform.backend, rank=place.rank, world_size=place.world_size, timeout=timeout)


def start_model_parallel(parallel: ParallelConfig, seed: int = 1234) -> None:
    """Builds Megatron-Core's groups for a layout, replacing another one, and seeds its RNG tracker.

    Groups of the same layout are used again: Gloo keeps a thread for each group it ever made.
    """
    prepare_megatron()
    from megatron.core import parallel_state, tensor_parallel

    wanted = (parallel.tensor, parallel.pipeline, parallel.context)
    if parallel_state.model_parallel_is_initialized() and _current_layout() != wanted:
        parallel_state.destroy_model_parallel()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
        )
    # Megatron-Core's tracker differs between tensor ranks, but is the same on all stages.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)


def _current_layout() -> tuple[int, int, int]:
    """(tensor, pipeline, context) of the groups that exist."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )


def stop_process_group() -> None:
    """Leaves the process group, so that the interpreter can exit without waiting for it."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()

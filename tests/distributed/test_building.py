"""A model is built on the host and moved to its device afterwards: building needs no collective on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.models import build_model
from tests import traces
from tests.distributed.test_layouts import uneven_config


def build_without_host_collectives(family: str, meeting: str) -> int:
    """Parameters of a model, built on groups that like NCCL's take no tensor of the host."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all have joined the job's own group
    dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    config = traces.Layout(tensor=2).apply(uneven_config(family))
    start_model_parallel(config.parallel, config.train.seed)
    return sum(parameter.numel() for parameter in build_model(config).parameters())


@pytest.mark.parametrize("family", ["implicit_llama", "implicit_mamba2"])
def test_building_needs_no_collective_on_the_host(pool, tmp_path: Path, family: str) -> None:
    assert all(pool(2).run(build_without_host_collectives, family, str(tmp_path / "meeting")))
